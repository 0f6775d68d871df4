"""The observations that led to one state of a keeper, and the states on the way there. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace

from keepbest.decision import Best, BestState, Decision, Observation, Policy, decide
from keepbest.iteration import TrainingIteration
from keepbest.run.events import Observed


@dataclass(frozen=True, slots=True)
class TimelineEntry:
    """An observation of a timeline, the snapshot that was taken of it, and whether it was a new best."""

    observation: Observation
    snapshot: str | None
    is_best: bool = True


@dataclass(slots=True)
class Timeline:
    """Observations that led to a state. A resume leaves it for a new one, which starts with a part of it.

    Attributes:
        number: Number among the timelines of the keeper, from 0.
        base: State that it starts from; empty unless a state was loaded that the ledger did not know.
        entries: Observations, in order.
        saved: Iteration and name of each snapshot, in order.
        best_snapshot: Newest snapshot of a new best.
        left: For each iteration at which bests without weights were forgotten, the snapshots that were left then.
        spare: Snapshots that stay until there is a new best, since the one before has no weights.
        skipped: Positions of bests that were skipped for a better one that is not committed yet.
    """

    number: int
    base: BestState = field(default_factory=BestState)
    entries: list[TimelineEntry] = field(default_factory=list)
    saved: dict[TrainingIteration, str] = field(default_factory=dict)
    best_snapshot: str | None = None
    left: dict[TrainingIteration, frozenset[str]] = field(default_factory=dict)
    spare: frozenset[str] = frozenset()
    skipped: list[int] = field(default_factory=list)

    def walk(
        self, policy: Policy, *, until: TrainingIteration | None
    ) -> Iterator[tuple[TimelineEntry, BestState, Decision]]:
        """Each entry up to `until` with the state after it, as `policy` sees it, and what followed from it."""
        state = self.base
        for entry in self.entries_until(until):
            state, decision = decide(policy, state, entry.observation)
            if (left := self.left.get(entry.observation.iteration)) is not None:
                state = self.with_only(left, policy, state)
            yield entry, state, decision

    def state(self, policy: Policy, *, until: TrainingIteration | None) -> BestState:
        """The state at `until`, as `policy` sees it."""
        states = [state for _, state, _ in self.walk(policy, until=until)]
        return states[-1] if states else self.base

    def with_only(self, left: Collection[str], policy: Policy, state: BestState) -> BestState:
        """`state`, which is one of this timeline, without bests whose snapshots are not among those that are `left`."""
        best = state.best if state.best is not None and self.saved.get(state.best.iteration) in left else None
        entries = self.entries_until(state.last_iteration)
        held = [Best(each.observation.value, each.observation.iteration) for each in entries if each.snapshot in left]
        return replace(state, best=best, top=policy.ranked(held))

    def entries_until(self, iteration: TrainingIteration | None) -> list[TimelineEntry]:
        """The entries that are not after `iteration`; `None` is before all of them."""
        if iteration is None:
            return []
        return [entry for entry in self.entries if not entry.observation.iteration.follows(iteration)]

    def reaches(self, iteration: TrainingIteration | None) -> bool:
        """Whether the timeline knows the state at `iteration`, which must not be before its start."""
        start = self.base.last_iteration
        return start is None or (iteration is not None and not start.follows(iteration))

    def top(self, policy: Policy, after: Best, holds: Callable[[str], bool]) -> tuple[Best, ...]:
        """The best values of snapshots that are there, the best first; as if `after` had been one more."""
        if policy.top_k == 1:
            return ()
        values = {entry.observation.iteration: entry.observation.value for entry in self.entries if entry.snapshot}
        held = [Best(values[iteration], iteration) for iteration, name in self.saved.items() if holds(name)]
        return policy.ranked([*held, after])

    def snapshots_of(self, state: BestState) -> set[str]:
        """The snapshots that `state`, which is one of this timeline, names."""
        bests = [state.best, *state.exceeded.values(), *state.top]
        names = (self.saved.get(best.iteration) for best in bests if best is not None)
        return {name for name in names if name is not None}

    def take_over(self, entries: Iterable[TimelineEntry]) -> None:
        """Start with entries of another timeline."""
        for entry in entries:
            self.entries.append(entry)
            if entry.snapshot is not None:
                self.saved[entry.observation.iteration] = entry.snapshot

    def add(self, event: Observed) -> None:
        """Add what was observed next."""
        if event.superseded:
            self.skipped.append(len(self.entries))
        self.take_over([TimelineEntry(event.observation, event.snapshot, event.is_best)])
        if event.lost:
            self.skipped.clear()
        if event.snapshot is not None and event.is_best:
            self.best_snapshot = event.snapshot
            self.spare = frozenset()
            self.entries, self.skipped = self.counting_skipped().entries, []

    def counting_skipped(self) -> Timeline:
        """This timeline as it will be if a better best is committed than those that were skipped."""
        entries = [*self.entries] if self.skipped else self.entries
        for position in self.skipped:
            entry = entries[position]
            entries[position] = replace(entry, observation=replace(entry.observation, durable=True))
        return replace(self, entries=entries, skipped=[])

    @property
    def last_iteration(self) -> TrainingIteration | None:
        """The iteration of the newest observation."""
        return self.entries[-1].observation.iteration if self.entries else self.base.last_iteration

"""What the events of a ledger add up to. Pure: the same events always give the same history."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from keepbest.decision import Policy
from keepbest.errors import LedgerError
from keepbest.iteration import TrainingIteration
from keepbest.run.events import (
    CheckpointSaved,
    Event,
    KeeperBegan,
    KeeperEnded,
    Observed,
    Pinned,
    RefsMoved,
    Rewound,
    RunBegan,
    SessionBegan,
    Unpinned,
)
from keepbest.run.layout import LEDGER
from keepbest.run.lines import RESTORE
from keepbest.run.names import RESUME_PREFIX
from keepbest.run.timeline import Timeline


class ResumeCheckpoint(NamedTuple):
    """A resume checkpoint: its iteration, and the snapshots that the states in it name."""

    iteration: TrainingIteration
    needs: frozenset[str]


@dataclass(slots=True)
class KeeperHistory:
    """What one keeper of the run has seen.

    Attributes:
        metric_key: Metric that it monitors.
        policy: Policy with which the keeper last began.
        timelines: One for each time that it began; the last is the present one.
        kept_best: Value of the snapshot that the ref on the best points at; the best that was ever saved, as far as it
            is still there.
        has_ended: Whether training was over for it. If not, it trains, or was interrupted.
    """

    metric_key: str
    policy: Policy
    timelines: list[Timeline] = field(default_factory=list)
    kept_best: float | None = None
    has_ended: bool = False

    @property
    def present(self) -> Timeline:
        """The newest timeline."""
        return self.timelines[-1]

    def timeline(self, number: int | None) -> Timeline:
        """The timeline of this number; the present one for `None`, or where the ledger does not know the number."""
        return self.timelines[number] if number is not None and number < len(self.timelines) else self.present

    def begin(self, branch: Timeline | None, event: KeeperBegan) -> None:
        """Start a new timeline: with a part of `branch`, or from the state of the event."""
        timeline = Timeline(len(self.timelines))
        if branch is not None:
            timeline.base = branch.base
            timeline.take_over(branch.entries_until(event.at))
            known = {entry.observation.iteration for entry in timeline.entries}
            timeline.left = {iteration: left for iteration, left in branch.left.items() if iteration in known}
        elif event.state is not None:
            timeline.base = event.state
        if event.left is not None:
            self._forget(timeline, frozenset(event.left))
        # With another `min_delta` than before, another one of those that were saved may be the best.
        best = timeline.state(self.policy, until=timeline.last_iteration).best
        timeline.best_snapshot = None if best is None else timeline.saved.get(best.iteration)
        if event.left is not None and best is None:
            timeline.spare = frozenset(event.left)
        if event.keeper in event.refs:
            self.kept_best = None if best is None else best.value
        self.timelines.append(timeline)
        self.has_ended = False

    def _forget(self, timeline: Timeline, left: frozenset[str]) -> None:
        if timeline.entries:
            last = timeline.entries[-1].observation.iteration
            timeline.left[last] = left & timeline.left.get(last, left)
        else:
            timeline.base = timeline.with_only(left, self.policy, timeline.base)


@dataclass(slots=True)
class History:
    """The whole of a run folder.

    Attributes:
        run_id: Id of the run; `None` while the ledger is empty.
        restarts: Number of times that the run was resumed.
        keepers: History of each keeper, by the name of its ref on the best.
        refs: Name of the ref -> name of the snapshot.
        pins: (keeper, tag) -> snapshots that must stay while the tag is pinned.
        tags: (keeper, tag) of all that was ever pinned.
        manifests: Name of the snapshot -> digest of its `snapshot.json`.
        checkpoints: Name of the snapshot -> the resume checkpoint that it is.
        abandoned: Refs on resume checkpoints of a timeline that was left.
    """

    run_id: str | None = None
    restarts: int = 0
    keepers: dict[str, KeeperHistory] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pins: dict[tuple[str, str], frozenset[str]] = field(default_factory=dict)
    tags: set[tuple[str, str]] = field(default_factory=set)
    manifests: dict[str, str] = field(default_factory=dict)
    checkpoints: dict[str, ResumeCheckpoint] = field(default_factory=dict)
    abandoned: frozenset[str] = frozenset()

    @classmethod
    def of(cls, events: Iterable[Event], ledger: Path | str = LEDGER) -> History:
        """The history that the events of a ledger add up to; `ledger` is what errors call it.

        Raises:
            LedgerError: If an event does not follow from those before it. It names the line.
        """
        history = cls()
        for number, event in enumerate(events, start=1):
            try:
                history.apply(event)
            except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
                raise LedgerError(
                    f"{ledger}, line {number} makes no sense ({error!r}): {event!r}; {RESTORE}"
                ) from error
        return history

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever observed: what is there can be begun anew."""
        return not any(timeline.entries for keeper in self.keepers.values() for timeline in keeper.timelines)

    @property
    def has_ended(self) -> bool:
        """Whether training was over for every keeper."""
        return bool(self.keepers) and all(keeper.has_ended for keeper in self.keepers.values())

    def apply(self, event: Event) -> None:
        """Take in one more event. Raises as `check`."""
        self.check(event)
        self.take(event)

    def check(self, event: Event) -> None:
        """Check that an event follows from those before it.

        Raises:
            LookupError, ValueError: If not.
        """
        named = {snapshot for snapshot in event.refs.values() if snapshot is not None} if event.refs else set()
        match event:
            case Observed():
                last = self.keepers[event.keeper].present.last_iteration
                if last is not None and not event.iteration.follows(last):
                    raise ValueError(f"{event.iteration} does not come after {last}")
                if event.snapshot is not None:
                    self._check_name(event.snapshot, event.manifest)
                    named.discard(event.snapshot)
            case CheckpointSaved():
                self._check_name(event.snapshot, event.manifest)
                named = (named | {*event.needs}) - {event.snapshot}
            case KeeperBegan(state=None):
                if event.timeline is None:
                    raise ValueError("a keeper begins with neither a timeline nor a state")
                _ = self.keepers[event.keeper].timelines[event.timeline]
            case Pinned():
                named.update(event.snapshots)
            case RefsMoved():
                _ = self.keepers[event.keeper].present
        if named and (unknown := named - self.manifests.keys()):
            raise ValueError(f"no line before it introduces the snapshots {', '.join(sorted(unknown))}")

    def take(self, event: Event) -> None:
        """Take in one more event, which was checked."""
        match event:
            case Observed():
                self._observe(event)
            case RunBegan():
                self.run_id = event.run
            case SessionBegan():
                self.restarts = event.restart
            case KeeperBegan():
                self._begin(event)
            case Pinned():
                self.pins[event.keeper, event.tag] = frozenset(event.snapshots)
                self.tags.add((event.keeper, event.tag))
            case Unpinned():
                self.pins.pop((event.keeper, event.tag), None)
            case RefsMoved():
                self.keepers[event.keeper].present.skipped.clear()
                self.keepers[event.keeper].has_ended |= isinstance(event, KeeperEnded)
            case CheckpointSaved():
                self.manifests.setdefault(event.snapshot, event.manifest)
                self.checkpoints[event.snapshot] = ResumeCheckpoint(event.iteration, frozenset(event.needs))
                self.abandoned = frozenset()
            case Rewound():
                self.abandoned = frozenset(event.abandoned)
        for name, snapshot in event.refs.items():
            if snapshot is None:
                self.refs.pop(name, None)
            else:
                self.refs[name] = snapshot

    def kept(self) -> set[str]:
        """The snapshots that must stay: `copied`, and what a ref on a resume checkpoint names, and that one needs."""
        on_checkpoints = [snapshot for ref, snapshot in self.refs.items() if ref.startswith(RESUME_PREFIX)]
        needs = (self.checkpoints[name].needs for name in on_checkpoints if name in self.checkpoints)
        return self.copied().union(on_checkpoints, *needs)

    def copied(self) -> set[str]:
        """The snapshots that a remote copy has too: those that a ref of a keeper, a pin or a timeline's best names."""
        timelines = [keeper.present for keeper in self.keepers.values()]
        bests = (timeline.best_snapshot for timeline in timelines if timeline.best_snapshot is not None)
        spare = (timeline.spare for timeline in timelines)
        refs = (snapshot for ref, snapshot in self.refs.items() if not ref.startswith(RESUME_PREFIX))
        return {*refs, *bests}.union(*self.pins.values(), *spare)

    def _check_name(self, snapshot: str, manifest: str | None) -> None:
        if self.manifests.get(snapshot, manifest) != manifest:
            raise ValueError(f"the name {snapshot} is used for a second snapshot")

    def _begin(self, event: KeeperBegan) -> None:
        keeper = self.keepers.setdefault(event.keeper, KeeperHistory(event.metric_key, event.policy))
        keeper.policy = event.policy
        branch = None if event.state is not None or event.timeline is None else keeper.timelines[event.timeline]
        keeper.begin(branch, event)

    def _observe(self, event: Observed) -> None:
        keeper = self.keepers[event.keeper]
        keeper.present.add(event)
        if event.snapshot is not None and event.manifest is not None:
            self.manifests.setdefault(event.snapshot, event.manifest)
            if event.refs.get(event.keeper) == event.snapshot:
                keeper.kept_best = event.value

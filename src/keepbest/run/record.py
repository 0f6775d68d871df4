"""What one keeper records in a run folder: its observations, its snapshots, and the refs that follow."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from keepbest.decision import Best, BestState, Observation, Policy, decide
from keepbest.iteration import TrainingIteration
from keepbest.listing import listed
from keepbest.misspelling import nearest
from keepbest.run.checkpoints import forget_gone
from keepbest.run.events import KeeperBegan, KeeperEnded, Moves, Observed, Pinned, RefsMoved, Unpinned
from keepbest.run.folder import RunFolder
from keepbest.run.history import KeeperHistory
from keepbest.run.ref_moves import Kept, moves_of, rescued, resumed, tolerance_moves
from keepbest.run.takeover import OWN_LOOP, Existing, LoadedState, check_takeover, describe_other_policy
from keepbest.run.timeline import Timeline
from keepbest.user_code import Log

_logger = Log(__name__)


class Revision(NamedTuple):
    """What rank 0 has recorded, for ranks that believe something else.

    Attributes:
        state: State of the timeline.
        value: Value of its newest observation; `None` if there is none.
    """

    state: BestState
    value: float | None

    def to_text(self) -> str:
        """As text; `from_text` is the inverse."""
        return json.dumps([self.state.to_json(), self.value])

    @classmethod
    def from_text(cls, text: str) -> Revision:
        """The inverse of `to_text`."""
        state, value = json.loads(text)
        return cls(BestState.from_json(state), value)


class KeeperRecord:
    """The record of one keeper. **Rank-local**: rank 0 alone has one.

    Args:
        folder: Run folder that it is in.
        keeper: Name of the keeper, which is that of its ref on the best.
        metric_key: Metric that the keeper monitors.
        policy: Policy by which it decides.
    """

    def __init__(self, folder: RunFolder, keeper: str, metric_key: str, policy: Policy) -> None:
        self.folder = folder
        self.keeper = keeper
        self.metric_key = metric_key
        self._policy = policy
        self._is_ahead = False  # of those who decide: they do not know yet of a best that was lost

    def begin(
        self,
        *,
        loaded: LoadedState | None = None,
        from_ledger: bool = False,
        at: TrainingIteration | None = None,
        existing: Existing = OWN_LOOP,
    ) -> BestState:
        """Start or resume the keeper, and bring the folder into the state that the ledger records.

        Args:
            loaded: State to resume from. The ledger up to its last iteration wins over it.
            from_ledger: Whether to resume from the ledger alone.
            at: Iteration to resume at, with `from_ledger`; `None` is the end of the ledger.
            existing: What happens to a run that is there and is not resumed.

        Raises:
            RunExistsError: If the folder holds a run that is not resumed, or another one than that of `loaded`.
            ConfigError: If another keeper has this name, or the run kept the metric in the other direction.
            LedgerError: If the ledger is not the one that the folder was written with, or that its remote copy has.
            SnapshotError: If the remote copy cannot be read.
            OSError: Any refusal of the file system, or of the remote storage.
        """
        folder, keeper, policy = self.folder, self.keeper, self._policy
        resumes = loaded is not None or from_ledger
        check = partial(check_takeover, keeper=keeper, policy=policy, loaded=loaded, existing=existing)
        # Not where another keeper of this process has resumed it.
        if existing.sets_aside and folder.is_resumed and not resumes and not folder.is_open:
            folder.set_aside()
        check(folder.path, folder.history, resumes=resumes or not folder.is_resumed)
        is_first_to_follow = folder.bring_up_to_copy(partial(check, resumes=resumes))
        folder.check_is_whole()
        past = folder.history.keepers.get(keeper)
        branch = None if past is None else past.timeline(None if loaded is None else loaded.timeline)
        if loaded is not None:
            at = loaded.state.last_iteration
        elif at is None and branch is not None:
            at = branch.last_iteration
        if branch is not None and not branch.reaches(at):
            branch = None
        known = state = BestState() if loaded is None else loaded.state
        if past is not None and branch is not None:
            known = branch.state(past.policy, until=at)
            before = replace(policy, min_delta=past.policy.min_delta, baseline=past.policy.baseline)
            # The state may be older than a session with other settings, to which these have returned.
            if loaded is not None and loaded.state not in (known, branch.state(before, until=at)):
                _logger.warning(
                    "%s: the ledger records another state than the one that was loaded, and wins. Ledger: %s. Loaded: "
                    "%s.",
                    keeper,
                    known.to_json(),
                    loaded.state.to_json(),
                )
            if policy != before and branch.entries_until(at):
                now = branch.state(policy, until=at)
                _logger.warning("%s: %s", keeper, describe_other_policy(before, policy, known, now))
        event, state = self._beginning(branch, at, state, known)
        folder.open(None if loaded is None else loaded.run_id)
        folder.commit(event)
        self._repair_pins()
        if is_first_to_follow and folder.copy is not None:
            folder.copy.arrive()  # a bucket that is not there is an error before training
        return state

    def _beginning(
        self, branch: Timeline | None, at: TrainingIteration | None, loaded: BestState, known: BestState
    ) -> tuple[KeeperBegan, BestState]:
        """How the keeper begins: at a point of a timeline, or from a state that was loaded; and the state then.

        `known` is that state as it was with the settings of the time, which may have kept fewer bests.
        """
        keeper, history, holds = self.keeper, self.folder.history, self.folder.snapshots.holds
        past = history.keepers.get(keeper)
        before = () if past is None else past.policy.tolerances
        policy = replace(self._policy, tolerances=tuple({*before, *self._policy.tolerances}))
        timeline = Timeline(0, loaded) if branch is None else branch
        state = loaded if branch is None else branch.state(policy, until=at)
        left = self._left(timeline, state, known)
        if left is not None:
            state = timeline.with_only(left, policy, state)
        best = None if state.best is None else timeline.saved.get(state.best.iteration)
        refs = rescued(keeper, history, best, holds)
        if branch is not None:
            refs |= resumed(keeper, history, self._policy, branch, state, holds)
        event = KeeperBegan(
            keeper,
            self.metric_key,
            self._policy,
            timeline=None if branch is None else branch.number,
            at=at,
            state=loaded if branch is None else None,
            refs=refs,
            left=left,
        )
        exceeded = {
            tolerance: best for tolerance, best in state.exceeded.items() if tolerance in self._policy.tolerances
        }
        return event, state if branch is None else replace(state, exceeded=exceeded)

    def _left(self, timeline: Timeline, state: BestState, known: BestState) -> tuple[str, ...] | None:
        """The snapshots that are there, if that of a best is not. A warning names those that `known` has."""
        holds, path = self.folder.snapshots.holds, self.folder.path
        saved = {best: timeline.saved.get(best.iteration) for best in (state.best, *state.top) if best is not None}
        gone = [best for best, name in saved.items() if name is None or not holds(name)]
        if not gone:
            return None
        if state.best in gone:
            _logger.warning(
                "%s: the weights of the best, %s, are not in %s (any more): the next finite value is a new best",
                self.keeper,
                state.best,
                path,
            )
        elif lost := [best for best in gone if best in known.top]:
            _logger.warning("%s: the weights of %s are not in %s (any more)", self.keeper, listed(lost), path)
        return tuple(sorted(name for name in {*self.folder.history.kept(), *timeline.saved.values()} if holds(name)))

    def _repair_pins(self) -> None:
        """Pin again what is left of pins of which a snapshot is gone, and forget resume checkpoints that are gone."""
        forget_gone(self.folder)
        for (keeper, tag), names in list(self.folder.history.pins.items()):
            held = tuple(sorted(filter(self.folder.snapshots.holds, names)))
            if keeper == self.keeper and len(held) < len(names):
                _logger.warning("%s: not all weights that %s pinned are still there", keeper, tag)
                self.folder.commit(Pinned(keeper, tag, held))

    def observe(self, observation: Observation, newly_exceeded: Mapping[int, Best | None]) -> None:
        """Record an observation without a snapshot, and set the refs of the tolerances that it closes.

        Raises:
            OSError: Any refusal of the file system. The observation then goes to the disk with the next line.
        """
        exceeded = self._as_recorded(Kept(observation, False, newly_exceeded)).exceeded
        refs = self._tolerance_moves(exceeded) if exceeded else {}
        lost = not observation.durable
        event = Observed(self.keeper, observation.iteration, observation.value, lost=lost, refs=refs)
        if refs:
            self.folder.commit(event)
        else:
            self.folder.append(event)

    def lose(self, observation: Observation) -> None:
        """Record a best whose weights could not be written. Raises as `observe`.

        What follows for the next ones is worked out here until the `revision`, since the ranks do not know of it yet.
        """
        self._is_ahead = True
        self.observe(replace(observation, durable=False), {})

    def keep(self, kept: Kept, snapshot: str, manifest: str) -> bool:
        """Commit a new timeline best, or one of the top k, whose weights are durable, and move the refs.

        Args:
            kept: Observation, and what follows from it.
            snapshot: Name of the snapshot that holds the weights.
            manifest: Digest of its manifest.

        Returns:
            Whether it was recorded as a new best. After a save that failed this may be news to those who decided.

        Raises:
            OSError: Any refusal of the file system. Nothing was recorded then, unless the ledger `is_torn`.
        """
        self.folder.catch_up()
        kept = self._as_recorded(kept)
        refs = moves_of(kept, self.keeper, self.folder.history, snapshot, self.folder.snapshots.holds)
        iteration, value = kept.observation.iteration, kept.observation.value
        event = Observed(self.keeper, iteration, value, snapshot, manifest, is_best=kept.is_new_best, refs=refs)
        self.folder.commit(event, withdraw=True)
        return kept.is_new_best

    def supersede(self, observation: Observation) -> None:
        """Record a new timeline best whose weights nobody needs any more, since a better one follows.

        Raises:
            OSError: Any refusal of the file system. It then goes to the disk with the next line.
        """
        self.folder.append(Observed(self.keeper, observation.iteration, observation.value, superseded=True))

    def has(self, observation: Observation) -> bool:
        """Whether the observation is recorded, as the newest one. Raises `OSError` if that cannot be known."""
        self.folder.catch_up()
        return self.history.present.last_iteration == observation.iteration

    def revision(self, policy: Policy) -> Revision:
        """What is recorded, as `policy` sees it. Raises `OSError` if that cannot be known."""
        self.folder.catch_up()
        self._is_ahead = False
        timeline = self.history.present
        value = timeline.entries[-1].observation.value if timeline.entries else None
        return Revision(timeline.state(policy, until=timeline.last_iteration), value)

    def close_tolerances(self, exceeded: Mapping[int, Best | None]) -> None:
        """Set the refs of tolerances that closed earlier than was known, since a save had failed.

        Raises:
            OSError: Any refusal of the file system. It then goes to the disk with the next line.
        """
        if moves := self._tolerance_moves(exceeded):
            self.folder.commit(RefsMoved(self.keeper, moves))

    def drop_skipped(self) -> None:
        """Record that bests do not count that were skipped for one that was lost. Raises as `observe`."""
        if self.history.present.skipped:
            self.folder.append(RefsMoved(self.keeper, {}))

    def flush(self, state: BestState, *, pin: str | None) -> None:
        """Make all that was recorded durable, and `pin` what `state` names where there is a tag. Raises `OSError`."""
        self.folder.sync()
        if pin is not None:
            self.pin(pin, state)

    def pin(self, tag: str, state: BestState) -> None:
        """Keep the snapshots that `state` names until `tag` is pinned again or released. Raises `OSError`."""
        held = filter(self.folder.snapshots.holds, self.history.present.snapshots_of(state))
        self.folder.commit(Pinned(self.keeper, tag, tuple(sorted(held))))

    def unpin(self, tag: str) -> None:
        """Release what `tag` pinned. A warning says so where it never pinned anything. Raises `OSError`.

        A run that was resumed from before it was released may release it once more.
        """
        history = self.folder.history
        if (self.keeper, tag) not in history.tags:
            pinned = sorted(each for keeper, each in history.pins if keeper == self.keeper)
            listed = ", ".join(map(repr, pinned)) or "none"
            _logger.warning(
                "%s: nothing was ever pinned under %r; pinned are: %s%s", self.keeper, tag, listed, nearest(tag, pinned)
            )
        self.folder.commit(Unpinned(self.keeper, tag))

    def end(self, state: BestState) -> None:
        """Record that training is over: open tolerances get a provisional ref on the best. Raises `OSError`."""
        open_tolerances = [tolerance for tolerance in self._policy.tolerances if tolerance not in state.exceeded]
        self.folder.commit(KeeperEnded(self.keeper, self._tolerance_moves(dict.fromkeys(open_tolerances, state.best))))

    @property
    def history(self) -> KeeperHistory:
        """What the ledger records of this keeper."""
        return self.folder.history.keepers[self.keeper]

    @property
    def best_snapshot(self) -> str | None:
        """Name of the snapshot that the keeper's ref on the best points at."""
        return self.folder.history.refs.get(self.keeper)

    def _as_recorded(self, kept: Kept) -> Kept:
        """`kept`, with what follows from the record where that is ahead of those who decided."""
        if not self._is_ahead:
            return kept
        timeline = self.history.present.counting_skipped()
        state = timeline.state(self._policy, until=timeline.last_iteration)
        state, decision = decide(self._policy, state, kept.observation)
        return Kept(kept.observation, decision.is_new_best, state.exceeded)

    def _tolerance_moves(self, bests: Mapping[int, Best | None]) -> Moves:
        moves = tolerance_moves(self.keeper, self.history.present, bests, self.folder.snapshots.holds)
        return {ref: snapshot for ref, snapshot in moves.items() if self.folder.history.refs.get(ref) != snapshot}

"""The bookkeeping of one keeper: the state that all its ranks share, and the steps from a value to its record."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from keepbest.decision import BestState, Decision, Observation, Outcome, Policy, decide, outcome_again
from keepbest.errors import InvalidMetricError, StorageError
from keepbest.iteration import TrainingIteration
from keepbest.metric import Reading, agree_on_metric
from keepbest.new_best import NewBests
from keepbest.ranks import Ranks
from keepbest.run.record import KeeperRecord, Revision
from keepbest.run.ref_moves import Kept
from keepbest.run.takeover import Owner
from keepbest.saving.saver import Saver

if TYPE_CHECKING:  # pydantic takes long to import
    from keepbest.settings import KeeperSettings


class Bookkeeping:
    """What the ranks of a keeper know of its timeline, the same on each of them.

    Args:
        owner: Keeper, and the metric that it monitors.
        policy: Policy by which it decides.
        settings: Settings of the keeper.
        ranks: Ranks of the keeper.
        saver: Saver that records and saves what was decided.
        new_bests: New bests, for which hooks wait.
        remedy: What to do where a rank lacks the metric.

    Attributes:
        state: State after the newest observation.
    """

    def __init__(
        self,
        owner: Owner,
        policy: Policy,
        settings: KeeperSettings,
        *,
        ranks: Ranks,
        saver: Saver,
        new_bests: NewBests,
        remedy: str,
    ) -> None:
        self._owner, self._policy, self._settings = owner, policy, settings
        self._ranks, self._saver, self._new_bests, self._remedy = ranks, saver, new_bests, remedy
        self._is_rank_0_writing = False  # while the others continue
        self.state = BestState()

    def observe(self, read: Callable[[], Reading], find_iteration: Callable[[], TrainingIteration]) -> Outcome:
        """Agree on the next value, decide what follows, and record it, or save the model. **Collective**.

        Raises as `BestKeeper.observe`.

        Args:
            read: Function that reads the value of this rank.
            find_iteration: Function that finds the iteration of the value.
        """
        before = self.state
        observation, revision = self._agree(read, find_iteration)
        self._is_rank_0_writing = revision is not None
        iteration, value = observation.iteration, observation.value
        if revision is not None and iteration == self.state.last_iteration:
            return outcome_again(observation, before, self.state, revision.value)
        if not math.isfinite(value) and self._settings.on_nonfinite == "raise":
            raise InvalidMetricError(f"{self._owner.metric_key} is {value} at {iteration}, and on_nonfinite is 'raise'")
        state, decision = decide(self._policy, self.state, observation)
        # If this is interrupted before the end, the next exchange asks rank 0 what is recorded.
        self._saver.is_in_doubt = True
        outcome = (self._save if decision.is_saved else self._record)(observation, state, decision)
        self._saver.is_in_doubt = False
        self._is_rank_0_writing |= bool(outcome.newly_exceeded)
        self._new_bests.call_hooks()
        return outcome

    def settle(self, step: str, write: Callable[[KeeperRecord], None]) -> None:
        """Wait for what is being written, and let rank 0 write what all must know to be there. **Collective**.

        Raises:
            StorageError: On every rank, if something could not be written.
        """
        self._adopt(self._saver.settle(step))
        self._saver.write(step, write)

    def _agree(
        self, read: Callable[[], Reading], find_iteration: Callable[[], TrainingIteration]
    ) -> tuple[Observation, Revision | None]:
        """What all agree on, and what rank 0 has recorded, if not all know it. What it could not write comes first."""
        failure: BaseException | None = None
        iteration: TrainingIteration | None = None
        revised: Revision | None = None
        try:
            failure = self._saver.take_failure()
            iteration = find_iteration()
            revised = None if failure is not None else self._saver.revised_state()
        except BaseException as error:  # noqa: BLE001  # raised again on every rank: the others are waiting
            failure = failure or error
        value, news = agree_on_metric(
            self._ranks,
            self._owner.metric_key,
            read,
            self._settings.metric_reduction,
            failure=failure,
            note="" if revised is None else revised.to_text(),
            state=f"keeper={self._owner.name} iteration={iteration} state=({self.state})".encode(),
            saving=self._is_rank_0_writing,
            remedy=self._remedy,
        )
        if iteration is None:
            raise RuntimeError("a rank without an iteration raises in the exchange")
        revision = Revision.from_text(news) if news else None
        self._adopt(revision)
        return Observation(iteration, value), revision

    def _adopt(self, revision: Revision | None) -> None:
        """Adopt what rank 0 has recorded: without bests that were lost, with an observation that was interrupted."""
        if revision is not None:
            self.state = revision.state
            self._new_bests.expect()  # it may say of one that is older
            self._saver.all_know(revision)

    def _save(self, observation: Observation, state: BestState, decision: Decision) -> Outcome:
        iteration, value = observation.iteration, observation.value
        exceeded = {each: state.exceeded[each] for each in decision.newly_exceeded}
        which = "the new" if decision.is_new_best else "one of the"
        step = f"save {which} best of {self._owner.metric_key} at {iteration}"
        on_commit = partial(self._new_bests.commit, observation, self.state.best, decision.enters_top)
        if decision.is_new_best:
            self._new_bests.expect()
        try:
            self._saver.save(Kept(observation, decision.is_new_best, exceeded), step, on_commit)
        except StorageError as error:
            if self._settings.on_save_error == "raise":
                raise
            lost = replace(observation, durable=False)
            outcome = self._record(lost, *decide(self._policy, self.state, lost))
            self._saver.log_lost(iteration, error)
            return outcome
        self.state = state
        return Outcome(iteration, value, decision.is_new_best, decision.newly_exceeded, decision.enters_top)

    def _record(self, observation: Observation, state: BestState, decision: Decision) -> Outcome:
        self._saver.record(observation, {each: state.exceeded[each] for each in decision.newly_exceeded})
        self.state = state
        iteration, value, failed = observation.iteration, observation.value, not observation.durable
        return Outcome(iteration, value, False, decision.newly_exceeded, save_failed=failed)

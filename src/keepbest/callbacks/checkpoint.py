"""`CheckpointCallback`: saves resume checkpoints, and removes outdated ones."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from keepbest.callbacks.config import CallBackBaseConfig
from keepbest.callbacks.periodic import PeriodicCallback
from keepbest.callbacks.training_state import resume_state, whole_model
from keepbest.capture.share import Items
from keepbest.errors import RanksError
from keepbest.interval import IntervalType
from keepbest.modules.parts import Part
from keepbest.saving.resume_saver import ResumeSaver

if TYPE_CHECKING:
    from keepbest.iteration import TrainingIteration
    from keepbest.training.counter import UpdateCounter

_logger = logging.getLogger(__name__)
_EVERYTHING = Part("model", "")


class CheckpointCallbackConfig(CallBackBaseConfig):
    """Config of `CheckpointCallback`.

    Attributes:
        keep_last: Number of resume checkpoints to keep; `None` keeps all.
        save_on_exception: Whether a last one is saved when an exception ends training between two updates, in a
            callback or while the next batch is read, and reaches all ranks. Ranks wait for each other for
            `trainer.rank_timeout`, and then raise it without one.
    """

    name: Literal["CheckpointCallback"] = "CheckpointCallback"

    keep_last: Annotated[int, Field(gt=0, strict=True)] | None = 1
    save_on_exception: Annotated[bool, Field(strict=True)] = False


class CheckpointCallback(PeriodicCallback):
    """Saves resume checkpoints, after everything else that happens at the same iteration, and when training ends.

    Checkpoints of later iterations belong to an abandoned timeline. They are removed like old ones.
    """

    config_class: ClassVar[type[CheckpointCallbackConfig]] = CheckpointCallbackConfig
    runs_last: ClassVar[bool] = True

    def __init__(self, callback_config: CheckpointCallbackConfig, **kwargs: Any) -> None:
        super().__init__(callback_config, **kwargs)
        self._keep_last = callback_config.keep_last
        self._saves_on_exception = callback_config.save_on_exception
        self._saver: ResumeSaver | None = None
        self._newest: TrainingIteration | None = None

    @property
    def state_key(self) -> str:
        """One name for all: two of them in one run would remove each other's checkpoints, so they are refused."""
        return type(self).__name__

    def before_training(self, *, update_counter: UpdateCounter, **_kwargs: Any) -> None:
        """Open the run folder, after the keepers in it. **Collective**.

        Raises:
            KeepBestError: What `ResumeSaver.start` raises.
        """
        items = Items(whole_model(self.trainer), (_EVERYTHING,), True, resume_state(self.trainer, self.ranks))
        self._saver = ResumeSaver(self.directory, items, self.ranks, keep_last=self._keep_last)
        self._saver.start(update_counter.iteration, self.trainer.resumed_from)

    def periodic_callback(self, *, interval_type: IntervalType, update_counter: UpdateCounter, **_kwargs: Any) -> None:
        """Save a resume checkpoint, unless there is one of this iteration. **Collective**. Nothing in evaluation.

        Raises:
            KeepBestError: What `ResumeSaver.save` raises.
        """
        if interval_type != "eval":
            self._save(update_counter.iteration)

    def after_update(self, *, update_counter: UpdateCounter, **kwargs: Any) -> None:
        """As the interval says, and when training is about to end. **Collective**."""
        super().after_update(update_counter=update_counter, **kwargs)
        if self.trainer.is_done:
            self._save(update_counter.iteration)

    def before_preemption(self, *, update_counter: UpdateCounter, **_kwargs: Any) -> None:
        """Save a resume checkpoint now, unless there is one of this iteration. **Collective**."""
        self._save(update_counter.iteration)
        if self._saver is not None:
            self._saver.finish_removal()  # the process ends now, and would leave what is being removed

    def after_exception(
        self, *, update_counter: UpdateCounter, error: Exception, is_between_updates: bool, **_kwargs: Any
    ) -> None:
        """Save a resume checkpoint if that is wanted and every rank comes here. **Collective** where it is wanted."""
        if not self._saves_on_exception or self._saver is None:
            return
        if not is_between_updates:
            # At once, since the others may wait in torch for a rank that raised alone, until its process ends.
            _logger.warning(
                "no resume checkpoint was saved after %r: an update was under way, so the model and its random numbers "
                "are those of no iteration",
                error,
            )
            return
        iteration = update_counter.iteration
        try:
            # A rank that raised alone waits here in vain, or meets ranks in another step, which fail then too.
            self.ranks.agree(f"save a resume checkpoint at {iteration} after an exception", lambda: None)
        except RanksError as absent:
            _logger.warning("no resume checkpoint was saved after %r: %s", error, absent)
            return
        try:
            self._save(iteration)
        except Exception as failure:  # noqa: BLE001  # the first error is the one to raise
            _logger.warning("no resume checkpoint could be saved after %r: %r", error, failure)

    def after_training(self, **_kwargs: Any) -> None:
        """Release the run folder. **Rank-local**."""
        if self._saver is not None:
            self._saver.leave()

    def _save(self, iteration: TrainingIteration) -> None:
        if self._saver is None or iteration == self._newest:
            return
        for callback in self.trainer.callbacks:
            callback.before_checkpoint(name=str(iteration))
        self._saver.save(iteration)
        self._newest = iteration

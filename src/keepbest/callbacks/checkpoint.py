"""`CheckpointCallback`: saves resume checkpoints, and removes outdated ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from keepbest.callbacks.config import CallBackBaseConfig
from keepbest.callbacks.periodic import PeriodicCallback
from keepbest.callbacks.resume_checkpoint import write_resume_checkpoint
from keepbest.callbacks.resume_folder import ResumeFolder
from keepbest.interval import IntervalType

if TYPE_CHECKING:
    from keepbest.training.counter import UpdateCounter


class CheckpointCallbackConfig(CallBackBaseConfig):
    """Config of `CheckpointCallback`.

    Attributes:
        keep_last: Number of resume checkpoints to keep; `None` keeps all.
    """

    name: Literal["CheckpointCallback"] = "CheckpointCallback"

    keep_last: Annotated[int, Field(gt=0, strict=True)] | None = 1


class CheckpointCallback(PeriodicCallback):
    """Saves resume checkpoints, after everything else that happens at the same iteration.

    Checkpoints of later iterations belong to an abandoned timeline. They are removed like old ones.
    """

    config_class: ClassVar[type[CheckpointCallbackConfig]] = CheckpointCallbackConfig
    runs_last: ClassVar[bool] = True

    def __init__(self, callback_config: CheckpointCallbackConfig, **kwargs: Any) -> None:
        super().__init__(callback_config, **kwargs)
        self._keep_last = callback_config.keep_last
        self._folder = ResumeFolder(self.directory)
        self._newest: str | None = None

    @property
    def state_key(self) -> str:
        """One name for all: two of them in one run would remove each other's checkpoints, so they are refused."""
        return type(self).__name__

    def periodic_callback(self, *, interval_type: IntervalType, update_counter: UpdateCounter, **_kwargs: Any) -> None:
        """Save a resume checkpoint. **Collective**. Nothing in evaluation.

        Raises:
            RankFailedError: On every rank, if a rank cannot write its share.
            StorageError: On every rank, if the file system refuses.
        """
        if interval_type == "eval":
            return
        self._save(str(update_counter.iteration))

    def before_preemption(self, *, update_counter: UpdateCounter, **_kwargs: Any) -> None:
        """Save a resume checkpoint now, unless there is one of this iteration. **Collective**."""
        if self._newest != (name := str(update_counter.iteration)):
            self._save(name)

    def _save(self, name: str) -> None:
        for callback in self.trainer.callbacks:
            callback.before_checkpoint(name=name)
        write_resume_checkpoint(self._folder, name, self.trainer, self.ranks)
        removed = self.ranks.broadcast(
            f"publish the resume checkpoint {name}",
            lambda: self._folder.publish(name, keep_last=self._keep_last),
            remedy=f"Check that {self._folder.path} can be written",
            saving=True,
        )
        for old in removed:
            for callback in self.trainer.callbacks:
                callback.after_checkpoint_removed(name=old)
        self._newest = name

"""`UpdateCounter`: how far training is, and when it ends."""

from __future__ import annotations

from typing import Any

from keepbest.errors import ConfigError
from keepbest.iteration import TrainingIteration


class UpdateCounter:
    """Counts completed optimizer updates; epochs and samples follow from them.

    Args:
        updates_per_epoch: Number of optimizer updates in one pass over the training set, >= 1.
        effective_batch_size: Number of samples in one update, over all ranks and accumulation steps, >= 1.
        end: End of training. Exactly one part is set and > 0. A number of samples that is not a multiple of the
            effective batch size is rounded up to a whole update.

    Raises:
        ConfigError: If one of these is out of range.
    """

    def __init__(self, *, updates_per_epoch: int, effective_batch_size: int, end: TrainingIteration) -> None:
        if updates_per_epoch < 1 or effective_batch_size < 1:
            raise ConfigError(
                "updates_per_epoch and effective_batch_size must be at least 1, "
                f"got {updates_per_epoch} and {effective_batch_size}"
            )
        given = [part for part in end.parts if part is not None]
        if len(given) != 1 or given[0] < 1:
            raise ConfigError(f"training must end at exactly one of epochs, updates and samples, > 0; got {end}")
        self.updates_per_epoch = updates_per_epoch
        self.effective_batch_size = effective_batch_size
        if end.epoch is not None:
            self.end_update = end.epoch * updates_per_epoch
        else:
            self.end_update = end.update if end.update is not None else -(-given[0] // effective_batch_size)
        self._update = 0

    @property
    def update(self) -> int:
        """Completed updates."""
        return self._update

    @property
    def epoch(self) -> int:
        """Completed epochs."""
        return self._update // self.updates_per_epoch

    @property
    def sample(self) -> int:
        """Samples in all completed updates, over all ranks."""
        return self._update * self.effective_batch_size

    @property
    def iteration(self) -> TrainingIteration:
        """Epoch, update and sample; none is absent."""
        return TrainingIteration(epoch=self.epoch, update=self.update, sample=self.sample)

    @property
    def is_full_epoch(self) -> bool:
        """Whether the last completed update ended an epoch."""
        return self._update > 0 and self._update % self.updates_per_epoch == 0

    @property
    def is_finished(self) -> bool:
        """Whether no update is left to do."""
        return self._update >= self.end_update

    def next_update(self) -> None:
        """Count one completed update."""
        self._update += 1

    def state_dict(self) -> dict[str, Any]:
        """The state, as plain integers. **Rank-local** and pure."""
        return {
            "update": self.update,
            "updates_per_epoch": self.updates_per_epoch,
            "effective_batch_size": self.effective_batch_size,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`. **Rank-local**.

        Raises:
            ConfigError: If the epochs or batches of that run had another size, because its iterations would then mean
                something else in this run.
        """
        for name in ("updates_per_epoch", "effective_batch_size"):
            if state_dict[name] != getattr(self, name):
                raise ConfigError(
                    f"the run to resume had {name}={state_dict[name]}, this one has {getattr(self, name)}; "
                    "use the training set and the effective_batch_size of that run"
                )
        self._update = state_dict["update"]

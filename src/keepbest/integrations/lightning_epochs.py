"""When an epoch of Lightning has logged everything, and whether a value was logged anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from keepbest.integrations.lightning_packages import Checkpoint

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


class _AfterEpochs(Checkpoint):
    """Is called when the module has logged at the end of an epoch, and no callback has changed the weights since.

    By its class: Lightning calls its checkpoint callbacks and early stopping then, and others when the next epoch
    starts, or training ends. In the order of the callbacks, a `StochasticWeightAveraging` may come first there.
    """

    def __init__(self, call: Callable[[Trainer], None]) -> None:
        self.call = call

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.call(trainer)


def call_after_epochs(trainer: Trainer, call: Callable[[Trainer], None]) -> None:
    """Call it at the end of each training epoch of this trainer, in this fit and in others."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if not any(isinstance(each, _AfterEpochs) and each.call == call for each in callbacks):
        # A new list, since the trainer is going through the old one. Last, since it asks the first one for its best.
        trainer.callbacks = [*callbacks, _AfterEpochs(call)]  # type: ignore[attr-defined]


def is_same(value: Any, before: Any) -> bool:
    """Whether this is what was logged before, by its place in memory, since Lightning makes new views of it."""
    if not (isinstance(value, torch.Tensor) and isinstance(before, torch.Tensor)):
        return False
    # While the former is held nothing else takes its place. Tensors without one have 0.
    return value is before or value.data_ptr() == before.data_ptr() != 0

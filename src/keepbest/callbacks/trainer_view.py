"""`TrainerView`: what a callback may use of the trainer that calls it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from keepbest.callbacks.base import CallbackBase
    from keepbest.training.average import Average
    from keepbest.training.counter import UpdateCounter


@runtime_checkable
class TrainerView(Protocol):
    """What a callback may use of the trainer that calls it.

    keepbest's own `Trainer` fulfils it, and so can any other. A callback that evaluates or saves weights takes
    `CallbackBase.model`, which is the average where there is one.
    """

    @property
    def model(self) -> nn.Module:
        """The model in training, as wrapped by the strategy."""

    @property
    def average(self) -> Average | None:
        """The moving average of the weights; `None` without `ema_decay`."""

    @property
    def optimizers(self) -> Mapping[str, Optimizer]:
        """The optimizers, by dotted name of the submodel."""

    @property
    def training_state(self) -> Mapping[str, Any]:
        """What else training continues from, by its name: objects with `state_dict` and `load_state_dict`."""

    @property
    def update_counter(self) -> UpdateCounter:
        """How far training is."""

    @property
    def callbacks(self) -> Sequence[CallbackBase]:
        """All callbacks of the run, in the order in which they are called. Set when the hooks are called."""

    @property
    def resume(self) -> Path | str | None:
        """The resume checkpoint that the run was asked to resume from; `None` if it was not asked to."""

    @property
    def resumed_from(self) -> Path | None:
        """Folder of the snapshot that the run was resumed from; `None` if it starts anew."""

    @property
    def is_done(self) -> bool:
        """Whether training ends after the callbacks of this update."""

    def stop(self, reason: str) -> None:
        """End training after the callbacks of this update. **Rank-local**, but every rank must call it.

        Args:
            reason: Sentence that rank 0 logs.
        """

"""When an epoch of Lightning has logged everything."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from keepbest.integrations.lightning_packages import Callback, Checkpoint

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


class _AfterEpochs(Checkpoint):
    """Calls when the module has logged at the end of an epoch, and no callback has changed the weights since.

    By its class: Lightning calls its checkpoint callbacks and early stopping then, and others when the next epoch
    starts, or training ends. In the order of the callbacks, a `StochasticWeightAveraging` may come first there.
    """

    def __init__(self, owner: Callback, call: Callable[[Trainer], None]) -> None:
        self.owner = owner
        self.call = call

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.call(trainer)


def call_after_epochs(trainer: Trainer, owner: Callback, call: Callable[[Trainer], None]) -> Any:
    """Call it at the end of each training epoch of this trainer, in this fit and in others.

    Returns:
        The callback with the state key of `owner` that was there before and is no more, if there was one: the
        `configure_callbacks` of a module makes its callbacks anew for each fit, validation and test.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    placed = [each for each in callbacks if isinstance(each, _AfterEpochs) and each.owner.state_key == owner.state_key]
    if any(each.owner is owner for each in placed):
        return None
    gone = [each for each in placed if each.owner not in callbacks]
    # A new list, since the trainer is going through the old one. Last, since it asks the first one for its best.
    trainer.callbacks = [*(each for each in callbacks if each not in gone), _AfterEpochs(owner, call)]  # type: ignore[attr-defined]
    return gone[0].owner if gone else None

"""How often a trainer of Lightning validates and updates, before it has begun."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from keepbest.errors import ConfigError
from keepbest.integrations.lightning_packages import GRADIENT_ACCUMULATION_SCHEDULERS

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


def validates(trainer: Trainer) -> bool:
    """Whether there is a validation in this training."""
    # There are no numbers yet where the first epochs are not validated.
    numbers = trainer.num_val_batches
    return trainer.enable_validation and (not numbers or sum(numbers) > 0)


def refuse_if_never_validated(trainer: Trainer) -> None:
    """Raise `ConfigError` if training ends before its first validation."""
    # By now Lightning has put a number of batches in place of a fraction of an epoch.
    every, batches, interval = trainer.check_val_every_n_epoch, trainer.num_training_batches, trainer.val_check_batch
    if interval is None:  # it is a time
        return
    if every is None:
        is_never = _most_batches(trainer) < interval
    elif math.isinf(batches):
        is_never = trainer.max_epochs is not None and 0 < trainer.max_epochs < every
    else:
        is_never = _most_batches(trainer) < (every - 1) * batches + min(interval, batches)
    if is_never and validates(trainer):
        raise ConfigError(
            f"training ends before it is first validated, so nothing would be observed: max_epochs="
            f"{trainer.max_epochs} and max_steps={trainer.max_steps}, with {batches} batches in an epoch; "
            f"check_val_every_n_epoch={every} and a validation after each {interval} batches. "
            "Train for longer, or validate earlier"
        )


def _most_batches(trainer: Trainer) -> float:
    """At most how many batches are trained, from the first fit on."""
    batches, updates = trainer.num_training_batches, trainer.max_steps
    most = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs * batches
    if updates < 0 or not _counts_updates_alike(trainer):
        return most
    each = trainer.accumulate_grad_batches
    if math.isinf(batches):
        return min(most, updates * each)
    epochs, rest = divmod(updates, math.ceil(batches / each))  # the end of an epoch makes an update of what is there
    return min(most, epochs * batches + min(rest * each, batches))


def refuse_if_never_at_a_step(trainer: Trainer, every: int) -> None:
    """Raise `ConfigError` if training ends before its update `every`."""
    if _counts_updates_alike(trainer) and trainer.estimated_stepping_batches < every:
        raise ConfigError(
            f"training ends before update {every}, so nothing would be observed with every_n_train_steps={every}: it "
            f"makes {trainer.estimated_stepping_batches} updates. Train for longer, or observe more often"
        )


def _counts_updates_alike(trainer: Trainer) -> bool:
    """Whether each epoch has an update for the same number of batches, which Lightning makes itself."""
    is_scheduled = any(
        isinstance(callback, GRADIENT_ACCUMULATION_SCHEDULERS)
        for callback in trainer.callbacks  # type: ignore[attr-defined]
    )
    return not is_scheduled and trainer.lightning_module.automatic_optimization

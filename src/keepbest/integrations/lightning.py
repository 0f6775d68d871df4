"""`BestCheckpoint`: a callback of PyTorch Lightning that keeps the best of a run with a `BestKeeper`."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer, callbacks
from typing_extensions import Unpack

from keepbest.errors import ConfigError, MissingMetricError
from keepbest.iteration import TrainingIteration
from keepbest.keeper import BestKeeper
from keepbest.metric import Reading, read_value
from keepbest.metric_properties import MetricPropertyProvider
from keepbest.new_best import Hook
from keepbest.ranks import Ranks
from keepbest.remote.storage import local_path
from keepbest.run.takeover import Existing
from keepbest.settings import KeeperSettings
from keepbest.settings_dict import KeeperSettingsDict

_logger = logging.getLogger(__name__)

# What the newest checkpoint of Lightning names is kept under one tag: no hook says which of them are removed.
_PIN = "lightning"
# Lightning has it since 2.6.
_WEIGHT_AVERAGING: type | tuple[()] = getattr(callbacks, "WeightAveraging", ())


class _Keeper(BestKeeper):
    _existing = Existing(
        resume="fit(ckpt_path=...), or resume='ledger' of BestCheckpoint",
        set_aside="existing='set_aside' of BestCheckpoint",
    )


class BestCheckpoint(Callback):
    """Observes a metric of `trainer.callback_metrics` after each validation of `fit`, except the sanity check.

    Where there is no validation, it observes at the end of each training epoch. Its state is in the checkpoints that
    Lightning writes. `fit(ckpt_path=...)` resumes it from there.

    A value that Lightning has reduced already (`sync_dist=True`) is the same on all ranks, and
    `metric_reduction="mean"` keeps exactly this value. `"identical"` refuses values that were not reduced. `"sum"`
    would add the value up again.

    Args:
        metric_key: Name under which the LightningModule logs the metric: in validation, or, where there is none, in
            training with `on_epoch=True`.
        directory: Directory of the run. `None` is the trainer's `default_root_dir`, which stays the same when a run is
            resumed, while each start of a logger has a folder of its own.
        metric_property_provider: As in `BestKeeper`.
        save_training_state: Whether optimizers and schedulers are kept with each best: as the training states
            `optimizer` and `scheduler`, or `optimizer.0` and so on where there are several.
        on_new_best: As in `BestKeeper`.
        **settings: The settings of `KeeperSettings`. They are described once, in the table of docs/settings.md.
            `resume="ledger"` resumes a folder that holds a run even if Lightning has no checkpoint to resume from, or
            one without this callback: at the iteration that training starts from, which may be the first.

    Attributes:
        keeper: Keeper of the present or last `fit` in this process. `None` before the first.

    Raises:
        ConfigError: If a setting is unknown or wrong.
    """

    def __init__(
        self,
        metric_key: str,
        *,
        directory: str | Path | None = None,
        metric_property_provider: MetricPropertyProvider | None = None,
        save_training_state: bool = False,
        on_new_best: Hook | Sequence[Hook] | None = None,
        **settings: Unpack[KeeperSettingsDict],
    ) -> None:
        checked = KeeperSettings.of(settings)
        self.metric_key = metric_key
        self.keeper: BestKeeper | None = None
        self._directory = None if directory is None else local_path(directory)
        self._id = checked.id
        self._resume, self._reduction = checked.resume, checked.metric_reduction
        self._saves_training_state = save_training_state
        self._make_keeper = partial(
            _Keeper,
            metric_key=metric_key,
            metric_property_provider=metric_property_provider,
            on_new_best=on_new_best,
            **checked.keeper_arguments(),
        )
        self._loaded: dict[str, Any] = {}
        self._open: BestKeeper | None = None
        self._epoch_to_observe: TrainingIteration | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(metric_key=self.metric_key, id=self._id)

    def state_dict(self) -> dict[str, Any]:
        """The state of the keeper; before there is one, what was loaded. **Rank-local**."""
        return self._loaded if self.keeper is None else self.keeper.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from this state when training starts. **Rank-local**."""
        self._loaded = state_dict

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the sanity check has logged other metrics, and not this one. **Rank-local**.

        Modules may log less in the sanity check than later, so this is no error.
        """
        if trainer.callback_metrics and trainer.is_global_zero and self.metric_key not in trainer.callback_metrics:
            _logger.warning("%s", self._read(trainer.callback_metrics, "the sanity check").absent)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the run folder, unless this is a `fast_dev_run`. **Collective**.

        By now the strategy has wrapped the model and restored what is resumed from, and the sanity check is over.

        Raises:
            ConfigError: On every rank, if a `WeightAveraging` callback is there too, or training ends before the first
                validation.
            KeepBestError: On every rank, as `BestKeeper` and its `start`.
        """
        # Lightning's Trainer sets both in a helper, where type checkers do not see them.
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if any(isinstance(callback, _WEIGHT_AVERAGING) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise ConfigError(
                "WeightAveraging validates averaged weights, and puts those in training back before they could be "
                f"saved as what reached {self.metric_key}: use one of WeightAveraging and BestCheckpoint"
            )
        _refuse_if_never_validated(trainer)
        model = pl_module if trainer.model is None else trainer.model
        self.keeper = self._make_keeper(
            model,
            directory=self._directory or trainer.default_root_dir,
            training_state=_training_state(trainer) if self._saves_training_state else None,
        )
        if self._loaded:
            self.keeper.load_state_dict(self._loaded)
            self._loaded = {}  # another fit of this callback loads its own, or starts anew
        self.keeper.start(at=_iteration_of(trainer, trainer.current_epoch) if self._resume == "ledger" else None)
        self._open, self._epoch_to_observe = self.keeper, None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Observe the metric: by now the module has logged it, and no checkpoint is written yet. **Collective**.

        In a `fast_dev_run` it only has to be there.

        Raises:
            KeepBestError: On every rank, as `BestKeeper.observe`.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            Ranks.connect().agree("look for the metric in a fast_dev_run", lambda: self._refuse_if_absent(trainer))
        self._observe(trainer, _iteration_of(trainer, trainer.current_epoch + 1), "validation")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Without validation, observe as soon as the module has logged the metric. **Rank-local**.

        What the module logs at the end of the epoch, it logs after this hook. The next of the hooks below observes.
        """
        if not _validates(trainer):
            self._epoch_to_observe = _iteration_of(trainer, trainer.current_epoch + 1)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """**Collective** after an epoch without validation. Raises as `on_validation_end`."""
        self._observe_epoch(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """**Collective** after an epoch without validation. Raises as `on_validation_end`."""
        self._observe_epoch(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Make durable what the checkpoint names, and keep it until there is a newer one. **Collective**.

        Lightning calls this on every rank before any of them writes. Raises as `on_validation_end` and
        `BestKeeper.flush`.
        """
        if self._open is not None:
            self._observe_epoch(trainer)
            self._open.flush(pin=_PIN)
            # Lightning has asked for the state already, before what was observed here.
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the keeper: the last checkpoint is written by now. **Collective**. Raises as `BestKeeper.close`."""
        if (keeper := self._let_go()) is not None:
            keeper.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the run as it is, for another `fit` to resume. **Rank-local**."""
        if (keeper := self._let_go()) is not None:
            keeper.abandon()

    def _observe_epoch(self, trainer: Trainer) -> None:
        iteration, self._epoch_to_observe = self._epoch_to_observe, None
        if iteration is not None:
            self._observe(trainer, iteration, "the training epoch")

    def _observe(self, trainer: Trainer, iteration: TrainingIteration, interval: str) -> None:
        if self._open is not None:
            self._open.observe_reading(lambda: self._read(trainer.callback_metrics, interval), iteration)

    def _let_go(self) -> BestKeeper | None:
        keeper, self._open = self._open, None
        return keeper

    def _refuse_if_absent(self, trainer: Trainer) -> None:
        absent = self._read(trainer.callback_metrics, "validation").absent
        if absent and (trainer.is_global_zero or self._reduction != "rank0"):
            raise MissingMetricError(absent)

    def _read(self, metrics: Mapping[str, Any], interval: str) -> Reading:
        if self.metric_key not in metrics:
            logged = ", ".join(sorted(metrics)) or "nothing"
            return Reading(absent=f"{self.metric_key!r} was not logged by the end of {interval}; logged: {logged}")
        return read_value(metrics[self.metric_key])


def _validates(trainer: Trainer) -> bool:
    # There are no numbers yet where the first epochs are not validated.
    numbers = trainer.num_val_batches
    return trainer.enable_validation and (not numbers or sum(numbers) > 0)


def _refuse_if_never_validated(trainer: Trainer) -> None:
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
    if is_never and _validates(trainer):
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
    is_scheduled = any(
        isinstance(callback, callbacks.GradientAccumulationScheduler)
        for callback in trainer.callbacks  # type: ignore[attr-defined]
    )
    if updates < 0 or is_scheduled or not trainer.lightning_module.automatic_optimization:
        return most
    each = trainer.accumulate_grad_batches
    if math.isinf(batches):
        return min(most, updates * each)
    epochs, rest = divmod(updates, math.ceil(batches / each))  # the end of an epoch makes an update of what is there
    return min(most, epochs * batches + min(rest * each, batches))


def _iteration_of(trainer: Trainer, epoch: int) -> TrainingIteration:
    """The present iteration. Only its batches differ between validations without an update in between."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.total.completed
    return TrainingIteration(epoch=epoch, update=trainer.global_step, batch=batches)


def _training_state(trainer: Trainer) -> dict[str, Any]:
    """Optimizers and schedulers of a trainer, by name."""
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    return {**_named("optimizer", trainer.optimizers), **_named("scheduler", schedulers)}


def _named(name: str, things: Sequence[Any]) -> dict[str, Any]:
    return {name if len(things) == 1 else f"{name}.{number}": thing for number, thing in enumerate(things)}

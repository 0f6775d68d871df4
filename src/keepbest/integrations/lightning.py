"""`BestCheckpoint`: a callback of PyTorch Lightning that keeps the best of a run with a `BestKeeper`.

For trainers of `pytorch_lightning` and for those of `lightning.pytorch`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Unpack

from keepbest.errors import ConfigError, MissingMetricError
from keepbest.face import Face
from keepbest.integrations.lightning_best import BestAsCheckpoint, show_to
from keepbest.integrations.lightning_epochs import call_after_epochs
from keepbest.integrations.lightning_intervals import refuse_if_never_at_a_step, refuse_if_never_validated, validates
from keepbest.integrations.lightning_metric import LoggedMetric
from keepbest.integrations.lightning_packages import WEIGHT_AVERAGINGS, Callback
from keepbest.iteration import TrainingIteration
from keepbest.keeper import BestKeeper
from keepbest.metric_properties import MetricPropertyProvider
from keepbest.misspelling import misspelt
from keepbest.new_best import Hook
from keepbest.ranks import NO_REMEDY, Ranks
from keepbest.remote.storage import local_path
from keepbest.run.takeover import Existing
from keepbest.settings import KeeperSettings, check_flag, check_metric_key
from keepbest.settings_dict import KeeperSettingsDict

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

_logger = logging.getLogger(__name__)

# What the newest checkpoint of Lightning names is kept under one tag: no hook says which of them are removed.
_PIN = "lightning"


class _Keeper(BestKeeper):
    _face = Face(
        Existing(
            resume="fit(ckpt_path=...), or resume='ledger' of BestCheckpoint",
            set_aside="existing='set_aside' of BestCheckpoint",
        ),
        unobserved="no validation, or interval of every_n_train_steps, came to its end",
    )

    def resumed_without_a_state(self) -> None:
        """Say how a run that is there would be resumed, since fit(ckpt_path=...) did not. **Rank-local**."""
        why = f"since the checkpoint has no state of {self.name}"
        self._face = self._face.resumed_by(f"resume='ledger' of BestCheckpoint, {why}")


class BestCheckpoint(Callback):
    """Observes a metric of `trainer.callback_metrics` after each validation of `fit`, except the sanity check.

    Where there is no validation, it observes at the end of each training epoch, and with `every_n_train_steps` within
    the epochs in place of both. Its state is in the checkpoints that Lightning writes. `fit(ckpt_path=...)` resumes it
    from there, and another `fit` of the same trainer continues.

    A value that Lightning has reduced already (`sync_dist=True`) is the same on all ranks, and
    `metric_reduction="mean"` keeps exactly this value. `"identical"` refuses values that were not reduced. `"sum"`
    would add the value up again.

    Args:
        metric_key: Name under which the LightningModule logs the metric: in validation, or, where there is none, in
            training with `on_epoch=True`. With `every_n_train_steps`, in `training_step`.
        directory: Directory of the run. `None` is the trainer's `default_root_dir`, which stays the same when a run is
            resumed, while each start of a logger has a folder of its own.
        every_n_train_steps: Number of updates after which the metric is observed, as Lightning counts them. `None`
            observes validations, or epochs.
        metric_property_provider: As in `BestKeeper`.
        save_training_state: Whether optimizers and schedulers are kept with each best: as the training states
            `optimizer` and `scheduler`, or `optimizer.0`, `optimizer.1` and up where there are several.
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
        every_n_train_steps: int | None = None,
        metric_property_provider: MetricPropertyProvider | None = None,
        save_training_state: bool = False,
        on_new_best: Hook | Sequence[Hook] | None = None,
        **settings: Unpack[KeeperSettingsDict],
    ) -> None:
        checked = KeeperSettings.of(settings, taken_by=BestCheckpoint)
        check_metric_key(metric_key)
        check_flag("save_training_state", save_training_state)
        if every_n_train_steps is not None and (type(every_n_train_steps) is not int or every_n_train_steps < 1):
            raise ConfigError(f"every_n_train_steps must be an integer of at least 1, found {every_n_train_steps!r}")
        self.metric_key = metric_key
        self._every = every_n_train_steps
        self.keeper: BestKeeper | None = None
        self._directory = None if directory is None else local_path(directory, "directory")
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
        self._metric = LoggedMetric(metric_key)
        self._best: BestAsCheckpoint | None = None  # of the last fit

    @property
    def state_key(self) -> str:
        return self._generate_state_key(metric_key=self.metric_key, id=self._id)

    def state_dict(self) -> dict[str, Any]:
        """The state of the keeper; before there is one, what was loaded. **Rank-local**."""
        return self._loaded if self.keeper is None else self.keeper.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from this state when training starts. **Rank-local**.

        During training it can only be the present one, which those load who look for a learning rate or a batch size.
        """
        if self._open is None:
            self._loaded = state_dict
        elif state_dict != self._open.state_dict():
            raise ConfigError("fit() trains already: pass the checkpoint to another fit(ckpt_path=...)")

    @property
    def best_model_path(self) -> str:
        """A checkpoint of Lightning with the best weights, in the directory of the run; empty before there is a best.

        **Rank-local**: rank 0 writes it when it is first asked for, with `export_checkpoint`. Other ranks know its name
        alone.

        Raises:
            KeepBestError: As `export_checkpoint`.
        """
        return "" if self._best is None else self._best.write()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Be the best that `ckpt_path="best"` of the trainer's other methods names, and write it for them.

        **Collective**. Raises as `best_model_path`, on every rank.
        """
        before = call_after_epochs(trainer, self, self._observe_epoch)
        replaced = None if before is None else self._succeed(before)
        if stage == "fit":
            self._loaded = {}  # what a checkpoint that was tested, for example, had
        if stage == "fit" or replaced is not None:
            show_to(trainer, self._name_best, instead_of=replaced)
        if stage != "fit" and self._best is not None:
            # Whether it was asked for, rank 0 says: others may have asked on some ranks alone.
            Ranks.connect().broadcast(
                f"write the best of {self.metric_key}", self._best.write_if_asked, remedy=NO_REMEDY, saving=True
            )

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a misspelt metric if the sanity check has logged the one that is meant. **Collective**.

        Any other metric that was not logged is a warning: modules may log less here than later, or log it in training.
        With `every_n_train_steps` it is one of training.

        Raises:
            MissingMetricError: On every rank.
        """
        if self._every is None:
            Ranks.connect().agree("look for the metric in the sanity check", lambda: self._refuse_if_misspelt(trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the keeper, unless this is a `fast_dev_run`. **Collective**.

        By now the strategy has wrapped the model and restored what is resumed from, and the sanity check is over.

        Raises:
            ConfigError: On every rank, if the trainer is a barebones one or has a `WeightAveraging` callback too, or
                training ends before the first validation.
            KeepBestError: On every rank, as `BestKeeper` and its `start`.
        """
        # Lightning's Trainer sets both in a helper, where type checkers do not see them.
        if trainer.barebones:
            raise ConfigError(
                "with barebones=True Lightning logs nothing, so there would be no metric to observe: leave out one of "
                "barebones and BestCheckpoint"
            )
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if any(isinstance(callback, WEIGHT_AVERAGINGS) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise ConfigError(
                "WeightAveraging validates averaged weights, and puts those in training back before they could be "
                f"saved as what reached {self.metric_key}: use one of WeightAveraging and BestCheckpoint"
            )
        if self._every is None:
            refuse_if_never_validated(trainer)
        else:
            refuse_if_never_at_a_step(trainer, self._every)
        self._open_keeper(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Observe the metric: by now the module has logged it, and no checkpoint is written yet. **Collective**.

        In a `fast_dev_run` it only has to be there.

        Raises:
            KeepBestError: On every rank, as `BestKeeper.observe`.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            Ranks.connect().agree("look for the metric in a fast_dev_run", lambda: self._refuse_if_absent(trainer))
        if self._every is None:
            self._observe(trainer, _iteration_of(trainer, trainer.current_epoch + 1), "validation")
        else:  # it is no metric of training that a validation logged
            self._metric.begin_interval(trainer.callback_metrics)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """With `every_n_train_steps`, observe after that many. **Collective**. Raises as `on_validation_end`."""
        if self._every is None or self._open is None or trainer.global_step % self._every:
            return
        last = self._open.state.last_iteration
        # Several batches may come between two updates.
        if trainer.global_step > (0 if last is None or last.update is None else last.update):
            iteration = _iteration_of(trainer, trainer.current_epoch + 1)
            self._observe(trainer, iteration, f"update {trainer.global_step}")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What was logged in another epoch is no value of this one. **Rank-local**."""
        self._metric.begin_interval(trainer.callback_metrics)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Without validation, observe as soon as the module has logged the metric. **Rank-local**.

        What the module logs at the end of the epoch, it logs after this hook, and before what `setup` has added.
        """
        if self._every is None and not validates(trainer):
            self._epoch_to_observe = _iteration_of(trainer, trainer.current_epoch + 1)

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
        """Close the keeper: the last checkpoint is written by now. **Collective**.

        A training that was over when it was resumed calls no hook before. Its best is there all the same.

        Raises:
            KeepBestError: On every rank, as `BestKeeper.close`, and its `start` after a training that was over.
        """
        if self._loaded and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._open_keeper(trainer, pl_module)
        if (keeper := self._let_go()) is not None:
            keeper.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the run as it is, for another `fit` to resume. **Rank-local**."""
        if (keeper := self._let_go()) is not None:
            keeper.abandon()

    def _open_keeper(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A trainer that fits once more, for example for more epochs, continues from where this callback was.
        if self.keeper is not None and trainer.ckpt_path is None and trainer.global_step > 0:
            self._loaded = self.keeper.state_dict()
        model = pl_module if trainer.model is None else trainer.model
        self.keeper = self._make_keeper(
            model,
            directory=self._directory or trainer.default_root_dir,
            training_state=_training_state(trainer) if self._saves_training_state else None,
        )
        self._best = BestAsCheckpoint(self.keeper, pl_module, trainer)
        if self._loaded:
            self.keeper.load_state_dict(self._loaded)
            self._loaded = {}
        elif trainer.ckpt_path is not None:
            self.keeper.resumed_without_a_state()
        self.keeper.start(at=_iteration_of(trainer, trainer.current_epoch) if self._resume == "ledger" else None)
        self._open, self._epoch_to_observe, self._metric = self.keeper, None, LoggedMetric(self.metric_key)

    def _succeed(self, before: BestCheckpoint) -> Callable[[], str]:
        """Continue the run of a callback in whose place this one is. Returns how that one named its best."""
        if self.keeper is None and self._directory == before._directory:
            self.keeper, self._best = before.keeper, before._best
        return before._name_best

    def _name_best(self) -> str:
        return "" if self._best is None else self._best.ask()

    def _observe_epoch(self, trainer: Trainer) -> None:
        iteration, self._epoch_to_observe = self._epoch_to_observe, None
        if iteration is not None:
            self._observe(trainer, iteration, "the training epoch")

    def _observe(self, trainer: Trainer, iteration: TrainingIteration, interval: str) -> None:
        if self._open is not None:
            self._open.observe_reading(lambda: self._metric.read(trainer.callback_metrics, interval), iteration)
            self._metric.begin_interval(trainer.callback_metrics)

    def _let_go(self) -> BestKeeper | None:
        keeper, self._open = self._open, None
        return keeper

    def _refuse_if_absent(self, trainer: Trainer) -> None:
        absent = self._metric.read(trainer.callback_metrics, "validation").absent
        if absent and (trainer.is_global_zero or self._reduction != "rank0"):
            raise MissingMetricError(absent)

    def _refuse_if_misspelt(self, trainer: Trainer) -> None:
        metrics = trainer.callback_metrics
        # Of a sanity check of several sets, Lightning does not show what was logged for each.
        is_shown = len(trainer.num_sanity_val_batches) == 1 and bool(metrics)
        if not trainer.is_global_zero or not is_shown or self.metric_key in metrics:
            return
        absent = self._metric.read(metrics, "the sanity check").absent
        if misspelt(self.metric_key, metrics) is not None:
            raise MissingMetricError(
                f"{absent} If the two differ, and the sanity check does not log {self.metric_key!r}, "
                "pass num_sanity_val_steps=0 to the Trainer"
            )
        _logger.warning("%s", absent)


def _iteration_of(trainer: Trainer, epoch: int) -> TrainingIteration:
    """The present iteration. Only its batches differ between validations without an update in between."""
    # After a batch it is completed only when the callbacks have seen it.
    batches = trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
    return TrainingIteration(epoch=epoch, update=trainer.global_step, batch=batches)


def _training_state(trainer: Trainer) -> dict[str, Any]:
    """Optimizers and schedulers of a trainer, by name."""
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    # Where `configure_optimizers` returns None, Lightning has an optimizer of nothing in its place.
    optimizers = [optimizer for optimizer in trainer.optimizers if optimizer.param_groups]
    return {**_named("optimizer", optimizers), **_named("scheduler", schedulers)}


def _named(name: str, things: Sequence[Any]) -> dict[str, Any]:
    return {name if len(things) == 1 else f"{name}.{number}": thing for number, thing in enumerate(things)}

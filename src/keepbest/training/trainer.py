"""A small trainer: the same global batches and gradients on any number of ranks, and callbacks around them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor

from keepbest.callbacks.assemble import assemble_callbacks
from keepbest.callbacks.base import CallbackBase
from keepbest.callbacks.checkpoint import CheckpointCallback, find_resume_checkpoint, load_resume_checkpoint
from keepbest.callbacks.data_iterator import PeriodicDataIteratorCallback
from keepbest.data.container import DataContainer
from keepbest.data.device import move_to_device
from keepbest.data.interleaved import InterleavedSampler, build_loader, count_updates_per_epoch
from keepbest.errors import ConfigError
from keepbest.metric_properties import MetricPropertyProvider
from keepbest.models import Model
from keepbest.random_state import restore_random_state, seed_random_state
from keepbest.ranks import Ranks
from keepbest.training.average import Average
from keepbest.training.config import RunConfig, TrainerConfig
from keepbest.training.counter import UpdateCounter
from keepbest.training.log_writer import LogWriter
from keepbest.training.preemption import Preemption
from keepbest.training.progress import Progress
from keepbest.training.strategy import (
    OptimizerFactory,
    autocast,
    build_optimizers,
    check_strategy,
    place,
    training_device,
    without_gradient_sync,
)
from keepbest.training.trackers import Tracker, build_tracker

logger = logging.getLogger(__name__)


class Trainer:
    """Trains one model on all ranks of the default process group, or in a single process.

    For a given effective batch size every number of ranks sees the same global batches, minimizes the same mean loss
    and makes the same updates, up to rounding. The training modes of the modules are left as they are.

    Args:
        config: how to train.
        model: what to train; it is moved, wrapped and changed by training.
        data_container: the datasets.
        directory: folder of the run.
        ranks: from `Ranks.connect()`.
        optimizers: makes an optimizer of parameters; one for all submodels, or one for each by dotted name.
        metric_property_provider: tells callbacks whether a higher value of a metric is better.
        seed: of the order of the samples, and, together with the rank, of all random numbers in training.
        resume: a resume checkpoint to go on from; "auto" is the newest complete one of this run, if there is any.

    Attributes:
        model: in training, as wrapped by the strategy.
        average: of its weights, which callbacks are given in its place; `None` without `ema_decay`.
        optimizers: by submodel.
        update_counter: how far training is.
        batch_size: samples of a micro-batch on one rank.
        callbacks: in the order in which they are called.

    Raises:
        ConfigError: if the settings do not fit each other, the data, the model or the number of ranks.
    """

    def __init__(
        self,
        config: TrainerConfig,
        model: Model,
        data_container: DataContainer,
        directory: Path | str,
        ranks: Ranks,
        *,
        optimizers: OptimizerFactory | Mapping[str, OptimizerFactory],
        metric_property_provider: MetricPropertyProvider | None = None,
        seed: int = 0,
        resume: Path | str | None = None,
    ) -> None:
        check_strategy(config.strategy, ranks)
        self.config = config
        self.data_container = data_container
        self.directory = Path(directory)
        self.ranks = ranks
        self.seed = seed
        self.resume = resume
        self.batch_size = config.batch_size(ranks.world_size)
        self.update_counter = UpdateCounter(
            updates_per_epoch=count_updates_per_epoch(
                data_container, config.train_dataset, effective_batch_size=config.effective_batch_size
            ),
            effective_batch_size=config.effective_batch_size,
            end=config.end,
        )
        self.device = training_device()
        self.average = self._build_average(model)
        self.model = place(model, config.strategy, precision=config.precision, device=self.device)
        self.optimizers = build_optimizers(model, optimizers)
        self.tracker: Tracker = build_tracker(config.tracker, self.directory, is_main=ranks.is_main)
        self.log_writer = LogWriter(self.tracker, self.update_counter, is_main=ranks.is_main)
        self.callbacks = assemble_callbacks(
            config.callbacks,
            trainer=self,
            model=self.model if self.average is None else self.average.model,
            data_container=data_container,
            log_writer=self.log_writer,
            tracker=self.tracker,
            metric_property_provider=metric_property_provider or MetricPropertyProvider(),
            ranks=ranks,
            directory=self.directory,
        )
        self._unwrapped = model
        self._stop_reason: str | None = None

    def train(self, *, on_start: Callable[[], None] = lambda: None) -> None:
        """Train to the end, or until a callback or a signal stops it. **Collective**.

        SIGTERM, SIGUSR1 or SIGINT on any rank ends training on all of them after the next update or the one after it,
        when the callbacks have made durable what a resumed run needs.

        Args:
            on_start: called on every rank before the first update, when nothing speaks against the run any more.

        Raises:
            ConfigError: if there is no complete checkpoint at `resume`, or it is of another kind of run.
            SnapshotError: if the checkpoint to resume from does not fit the model or the optimizers.
            PreemptedError: on every rank, if a signal stopped it.
        """
        with Preemption(self.ranks) as preemption, closing(self.tracker):
            random_state = self._load_resume_checkpoint()
            self.tracker.go_on_from(self.update_counter.iteration)
            self._call(self.callbacks, "before_training")
            on_start()
            self.log_writer.flush()
            data_iter = iter(self._build_loader())
            # Only now, so that nothing before the first update makes a resumed run differ from one that went through.
            if random_state is None:
                seed_random_state(self.seed + self.ranks.rank + self.ranks.world_size * self.update_counter.update)
            else:
                restore_random_state(random_state)
            with Progress(self.update_counter, is_main=self.ranks.is_main) as progress:
                while not self._is_done():
                    self._update(data_iter)
                    self._after_update(data_iter)
                    progress.advance()
                    if preemption.is_agreed() and not self._is_done():
                        self._preempt(preemption)
            if self._stop_reason is not None and self.ranks.is_main:
                logger.info("training stopped at %s: %s", self.update_counter.iteration, self._stop_reason)
            self._call(self.callbacks, "after_training")
            self.log_writer.flush()

    def eval(self, *, update: int = 0) -> dict[str, float]:
        """Run every callback's evaluation on the model as it is now. **Collective**.

        Args:
            update: that the weights are from; what is logged is stamped with it.

        Returns:
            What this rank logged, by key.
        """
        with closing(self.tracker):
            self.update_counter.load_state_dict({**self.update_counter.state_dict(), "update": update})
            self._call(self.callbacks, "at_eval", batch_size=self.batch_size)
            logged = {key: scalar.value for key, scalar in self.log_writer.log_cache.items()}
            self.log_writer.flush()
        return logged

    def stop(self, reason: str) -> None:
        """End training after the callbacks of this update. Must be called on every rank. **Rank-local**."""
        self._stop_reason = reason

    def _is_done(self) -> bool:
        return self.update_counter.is_finished or self._stop_reason is not None

    def _load_resume_checkpoint(self) -> dict[str, Any] | None:
        if self.resume is None:
            return None
        path = find_resume_checkpoint(self.directory, self.resume, self.ranks)
        return None if path is None else load_resume_checkpoint(path, self)

    def _build_average(self, model: Model) -> Average | None:
        config = self.config
        if config.ema_decay is None:
            return None
        return Average(
            model, config.ema_decay, strategy=config.strategy, precision=config.precision, device=self.device
        )

    def _build_loader(self) -> torch.utils.data.DataLoader[Any]:
        sampler = InterleavedSampler(
            self.data_container,
            train_key=self.config.train_dataset,
            batch_size=self.batch_size,
            accumulation_steps=self.config.accumulation_steps,
            configs=[callback.sampler_config for callback in self.callbacks if _takes_batches(callback)],
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            seed=self.seed,
            start_update=self.update_counter.update,
            end_update=self.update_counter.end_update,
        )
        return build_loader(sampler)

    def _update(self, data_iter: Iterator[Any]) -> None:
        steps = [self._accumulate(next(data_iter), step) for step in range(self.config.accumulation_steps)]
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.model)
        self.update_counter.next_update()
        losses = {name: torch.cat([step[name] for step in steps]) for name in steps[0]}
        self._call(self._tracking(), "track_after_update_step", losses=losses, batch_size=self.batch_size)

    def _accumulate(self, batch: Any, step: int) -> dict[str, Tensor]:
        batch = move_to_device(batch, self.device)
        is_last = step == self.config.accumulation_steps - 1
        with nullcontext() if is_last else without_gradient_sync(self.model):
            with autocast(self.config.precision, self.device):
                losses = self._unwrapped.losses(self.model(batch), batch)
            total = _total(losses, self.batch_size)
            torch.autograd.backward(total.mean() / self.config.accumulation_steps)
        losses = {name: loss.detach() for name, loss in losses.items()}
        self._call(
            self._tracking(),
            "track_after_accumulation_step",
            batch=batch,
            losses=losses,
            batch_size=self.batch_size,
            accumulation_step=step,
        )
        return losses

    def _after_update(self, data_iter: Iterator[Any]) -> None:
        hooks = ["after_update", "after_epoch"] if self.update_counter.is_full_epoch else ["after_update"]
        # A resume checkpoint after an update must also hold what the callbacks do at the end of that update's epoch.
        for runs_last in (False, True):
            callbacks = [callback for callback in self.callbacks if callback.runs_last == runs_last]
            for hook in hooks:
                for callback in callbacks:
                    batches = data_iter if _takes_batches(callback) else None
                    self._call([callback], hook, batch_size=self.batch_size, data_iter=batches)
        self.log_writer.flush()

    def _preempt(self, preemption: Preemption) -> NoReturn:
        in_order = sorted(self.callbacks, key=lambda callback: callback.runs_last)
        self._call(in_order, "before_preemption", batch_size=self.batch_size)
        if self.ranks.is_main and not any(isinstance(callback, CheckpointCallback) for callback in self.callbacks):
            logger.warning(
                "there is no CheckpointCallback: when this run is started again, it trains from the beginning"
            )
        preemption.stop(self.update_counter.iteration)

    def _tracking(self) -> list[CallbackBase]:
        return [each for callback in self.callbacks for each in (callback, *callback.get_children())]

    def _call(self, callbacks: list[CallbackBase], hook: str, **arguments: Any) -> None:
        # Callbacks that evaluate the model are to see it in the precision that it is trained in.
        with autocast(self.config.precision, self.device):
            for callback in callbacks:
                getattr(callback, hook)(update_counter=self.update_counter, **arguments)


def build_trainer(config: RunConfig) -> Trainer:
    """The trainer of a run. **Collective**: what fails on one rank, such as a dataset that is not there, fails on all.

    Raises:
        ConfigError: if something cannot be built as the config says.
    """
    ranks = Ranks.connect(rank_timeout=config.trainer.rank_timeout, save_timeout=config.trainer.save_timeout)
    model = ranks.agree("build the model", config.build_model)
    data_container = ranks.agree("open the datasets", config.build_data)
    return Trainer(
        config.trainer,
        model,
        data_container,
        config.directory,
        ranks,
        optimizers=config.optimizer_factories(),
        seed=config.seed,
        resume=config.trainer.resume,
    )


def _takes_batches(callback: CallbackBase) -> TypeGuard[PeriodicDataIteratorCallback]:
    # Those that run last are called out of the order in which the shared loader delivers.
    return isinstance(callback, PeriodicDataIteratorCallback) and not callback.runs_last


def _total(losses: dict[str, Tensor], batch_size: int) -> Tensor:
    if "total" not in losses:
        raise ConfigError(f"the model's losses must contain 'total', found {sorted(losses)}")
    for name, loss in losses.items():
        if loss.shape != (batch_size,):
            raise ConfigError(
                f"the model's losses must have one value for each of the {batch_size} samples of a batch; "
                f"{name!r} has shape {tuple(loss.shape)}"
            )
    return losses["total"]

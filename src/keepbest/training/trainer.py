"""`Trainer`: a small training loop that makes the same updates on any number of ranks, with callbacks around them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from torch.utils.data import DataLoader

from keepbest.callbacks.assemble import assemble_callbacks
from keepbest.callbacks.base import CallbackBase
from keepbest.callbacks.best_checkpoint import BestCheckpointCallback
from keepbest.callbacks.checkpoint import CheckpointCallback
from keepbest.callbacks.resume import Found, find_best, find_to_resume, load_to_resume
from keepbest.callbacks.trainer_view import TrainerView
from keepbest.callbacks.training_state import schedule_state
from keepbest.capture.per_rank import PerRank
from keepbest.data.container import DataContainer
from keepbest.data.interleaved import InterleavedSampler, build_loader, count_updates_per_epoch
from keepbest.errors import ConfigError
from keepbest.metric_properties import MetricPropertyProvider
from keepbest.models import Model
from keepbest.random_state import restore_random_state, seed_random_state
from keepbest.ranks import NO_REMEDY, Ranks
from keepbest.remote.storage import local_path
from keepbest.run.maintenance import set_aside
from keepbest.training.average import build_average
from keepbest.training.config import CONFIG_FILE, RunConfig, TrainerConfig
from keepbest.training.counter import UpdateCounter
from keepbest.training.epoch import OnlineLosses, line_of_epoch, log_epoch
from keepbest.training.hooks import Hooks
from keepbest.training.log_writer import LogWriter
from keepbest.training.preemption import Preemption
from keepbest.training.progress import Progress
from keepbest.training.strategy import (
    OptimizerFactory,
    ScheduleFactory,
    build_optimizers,
    build_schedules,
    check_lengths,
    check_strategy,
    place,
    training_device,
)
from keepbest.training.trackers import TRACKER_FILES, Tracker, build_tracker
from keepbest.training.update_step import UpdateStep

logger = logging.getLogger(__name__)


class Trainer:
    """Trains one model on all ranks of the default process group, or in a single process.

    For a given effective batch size every number of ranks sees the same global batches, minimizes the same mean loss
    and makes the same updates, up to rounding. The training modes of the modules are left as they are.

    Args:
        config: Settings of training.
        model: Model to train. Training moves, wraps and changes it.
        data_container: Datasets.
        directory: Directory of the run.
        ranks: Ranks that train together, from `Ranks.connect()`.
        optimizers: Function that makes an optimizer of parameters. One for all submodels, or one for each by dotted
            name.
        schedule: Function that makes the schedule of the learning rate of an optimizer; `None` for none.
        metric_property_provider: Provider from which callbacks learn whether a higher value of a metric is better.
        seed: Seed of the order of the samples and, together with the rank, of all random numbers in training.
        resume: Resume checkpoint to resume from; "auto" is the newest complete one of this run, if there is any. "best"
            is the best of the callback with `save_training_state`.

    Attributes:
        config: Settings of training.
        model: Model in training, as wrapped by the strategy.
        average: Average of its weights, which callbacks receive in its place; `None` without `ema_decay`.
        optimizers: Optimizers by submodel.
        training_state: What else training continues from, by its name: the schedules, and the losses of this epoch.
        update_counter: Counter of the completed updates.
        batch_size: Number of samples of a micro-batch on one rank.
        callbacks: Callbacks in the order in which they are called.
        resume: Resume checkpoint to resume from, as it was passed; a path is absolute.
        resumed_from: Folder of the snapshot that the run was resumed from; `None` if it starts anew.

    Raises:
        ConfigError: If the settings do not fit each other, the data, the model or the number of ranks.
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
        schedule: ScheduleFactory | None = None,
        metric_property_provider: MetricPropertyProvider | None = None,
        seed: int = 0,
        resume: Path | str | None = None,
    ) -> None:
        check_strategy(config.strategy, ranks)
        self.config = config
        self.data_container = data_container
        self.directory = local_path(directory, "directory")
        self.ranks = ranks
        self.seed = seed
        self.resume = resume if resume in (None, "auto", "best") else local_path(resume, "trainer.resume")
        self.batch_size = config.batch_size(ranks.world_size)
        self.update_counter = UpdateCounter(
            updates_per_epoch=count_updates_per_epoch(
                data_container, config.train_dataset, effective_batch_size=config.effective_batch_size
            ),
            effective_batch_size=config.effective_batch_size,
            end=config.end,
        )
        self.device = training_device()
        self.average = build_average(
            model, config.ema_decay, strategy=config.strategy, precision=config.precision, device=self.device
        )
        self.model = place(model, config.strategy, precision=config.precision, device=self.device)
        self.optimizers = build_optimizers(model, optimizers)
        schedules = build_schedules(self.optimizers, schedule)
        self._losses = OnlineLosses()
        self.training_state = {
            "online_losses": PerRank(self._losses),
            **{schedule_state(name): each for name, each in schedules.items()},
        }
        self.tracker: Tracker = build_tracker(config.tracker, self.directory, is_main=ranks.is_main)
        self.log_writer = LogWriter(self.tracker, self.update_counter, is_main=ranks.is_main)
        self.callbacks = self._assemble_callbacks(metric_property_provider or MetricPropertyProvider())
        self._hooks = Hooks(self.callbacks, self.update_counter, self.batch_size, config.precision, self.device)
        self._update_step = UpdateStep(
            model=self.model,
            unwrapped=model,
            optimizers=self.optimizers,
            schedules=schedules,
            clip_grad_norm=config.clip_grad_norm,
            average=self.average,
            accumulation_steps=config.accumulation_steps,
            batch_size=self.batch_size,
            precision=config.precision,
            device=self.device,
        )
        self.resumed_from: Path | None = None
        self._stop_reason: str | None = None
        self._is_between_updates = True

    def train(self, *, on_start: Callable[[], None] = lambda: None) -> None:
        """Train to the end, or until a callback or a signal stops it. **Collective**.

        SIGTERM, SIGUSR1 or SIGINT on any rank ends training on all of them after the next update or the one after it.
        Before that, the callbacks make durable what a resumed run needs.

        Args:
            on_start: Function that every rank calls before the first update, when all checks have passed.

        Raises:
            ConfigError: If there is no complete checkpoint at `resume`, or it belongs to another kind of run, or a
                schedule ends before training does.
            SnapshotError: If the checkpoint to resume from does not fit the model or the optimizers.
            PreemptedError: On every rank, if a signal stopped training.
            KeepBestError: What a callback raises.
        """
        with Preemption(self.ranks) as preemption, closing(self.log_writer):
            random_state = self._load_resume_checkpoint()
            # Only now, since a schedule continues with the length that it was saved with.
            check_lengths(self._update_step.schedules, self.update_counter.end_update)
            if self.config.existing == "set_aside" and self.resume is None:
                self.ranks.broadcast("set aside the run that is there", self._set_aside, remedy=NO_REMEDY, saving=True)
            self.tracker.resume_from(self.update_counter.iteration)
            self._hooks.before_training()
            on_start()
            self.log_writer.flush()
            data_iter = iter(self._build_loader())
            # Only now, so that nothing before the first update makes a resumed run differ from an uninterrupted one.
            if random_state is None:
                seed_random_state(self.seed + self.ranks.rank + self.ranks.world_size * self.update_counter.update)
            else:
                restore_random_state(random_state)
            with Progress(self.update_counter, is_main=self.ranks.is_main) as progress:
                while not self.is_done:
                    self._update_or_report(data_iter)
                    progress.advance()
                    if preemption.is_agreed() and not self.is_done:
                        self._preempt(preemption)
            if self._stop_reason is not None:
                stopped = partial(logger.info, "training stopped at %s: %s", self.update_counter.iteration)
                self._log_on_main("why training stopped", partial(stopped, self._stop_reason))
            self._hooks.after_training()
            self.log_writer.flush()

    def eval(self, *, update: int = 0) -> dict[str, float]:
        """Run every callback's evaluation on the model as it is now. **Collective**.

        Args:
            update: Update that the weights are from. It stamps what is logged.

        Returns:
            What this rank logged, by key.

        Raises:
            KeepBestError: What a callback raises.
        """
        with closing(self.log_writer):
            self.update_counter.load_state_dict({**self.update_counter.state_dict(), "update": update})
            self._hooks.at_eval()
            logged = {key: scalar.value for key, scalar in self.log_writer.log_cache.items()}
            self.log_writer.flush()
        return logged

    def stop(self, reason: str) -> None:
        """End training after the callbacks of this update. **Rank-local**, but every rank must call it.

        Args:
            reason: Sentence that rank 0 logs.
        """
        self._stop_reason = reason

    @property
    def is_done(self) -> bool:
        """Whether training ends after the callbacks of this update."""
        return self.update_counter.is_finished or self._stop_reason is not None

    def _set_aside(self) -> None:
        set_aside(self.directory, CONFIG_FILE, *TRACKER_FILES)

    def _assemble_callbacks(self, metric_property_provider: MetricPropertyProvider) -> list[CallbackBase]:
        view: TrainerView = self  # mypy checks here that the trainer has what callbacks are promised
        return assemble_callbacks(
            self.config.callbacks,
            trainer=view,
            model=self.model if self.average is None else self.average.model,
            data_container=self.data_container,
            log_writer=self.log_writer,
            tracker=self.tracker,
            metric_property_provider=metric_property_provider,
            ranks=self.ranks,
            directory=self.directory,
        )

    def _load_resume_checkpoint(self) -> dict[str, Any] | None:
        if self.resume is None:
            return None
        if self.resume == "best":
            found: Found | None = find_best(self.directory, self._name_best(), self.ranks)
        else:
            found = find_to_resume(self.directory, self.resume, self.ranks)
        if found is None:
            return None
        resumed = load_to_resume(found, self, self.ranks)
        self.resumed_from = resumed.path
        return resumed.random_state

    def _name_best(self) -> str:
        """The ref to continue from. Raises `ConfigError` if the config does not say which one."""
        keepers = [each for each in self.callbacks if isinstance(each, BestCheckpointCallback)]
        found = [each.keeper.name for each in keepers if each.keeps_training_state]
        if len(found) != 1:
            raise ConfigError(
                "trainer.resume=best needs one BestCheckpointCallback with save_training_state, and the config has "
                f"{', '.join(found) or 'none'}"
            )
        return found[0]

    def _build_loader(self) -> DataLoader[Any]:
        sampler = InterleavedSampler(
            self.data_container,
            train_key=self.config.train_dataset,
            batch_size=self.batch_size,
            accumulation_steps=self.config.accumulation_steps,
            configs=self._hooks.sampler_configs,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            seed=self.seed,
            start_update=self.update_counter.update,
            end_update=self.update_counter.end_update,
        )
        return build_loader(sampler)

    def _update_or_report(self, data_iter: Iterator[Any]) -> None:
        try:
            self._update(data_iter)
        except Exception as error:
            self._hooks.after_exception(error, is_between_updates=self._is_between_updates)
            raise

    def _update(self, data_iter: Iterator[Any]) -> None:
        track_micro_batch = partial(self._hooks.track, "track_after_accumulation_step")
        first = next(data_iter)  # a batch that cannot be read leaves everything as it was
        # The forward pass draws random numbers and changes buffers, so it is a part of the update too.
        self._is_between_updates = False
        losses = self._update_step.compute(chain((first,), data_iter), track_micro_batch)
        self._update_step.apply()
        self.update_counter.next_update()
        self._is_between_updates = True
        self._losses.add(losses)
        self._hooks.track("track_after_update_step", losses=losses)
        if self.update_counter.is_full_epoch:
            log_epoch(self._losses, self.optimizers, self.log_writer, self.ranks)
        self._hooks.after_update(data_iter)
        if self.update_counter.is_full_epoch:
            iteration = self.update_counter.iteration
            self._log_on_main("the epoch", lambda: logger.info("%s", line_of_epoch(iteration, self.log_writer)))
        self.log_writer.flush()

    def _log_on_main(self, what: str, log: Callable[[], None]) -> None:
        """Log on rank 0. **Collective**: what a handler raises, every rank raises, and none waits for rank 0."""
        self.ranks.agree(f"log {what}", lambda: log() if self.ranks.is_main else None)

    def _preempt(self, preemption: Preemption) -> NoReturn:
        self._hooks.before_preemption()
        if not any(isinstance(callback, CheckpointCallback) for callback in self.callbacks):
            text = "there is no CheckpointCallback: when this run is started again, it trains from the beginning"
            self._log_on_main("what a restart does", lambda: logger.warning(text))
        preemption.stop(self.update_counter.iteration)


def build_trainer(config: RunConfig) -> Trainer:
    """Build the trainer of a run. **Collective**: what fails on one rank, such as a missing dataset, fails on all.

    Raises:
        ConfigError: If something cannot be built as the config says.
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
        schedule=config.schedule_factory(),
        seed=config.seed,
        resume=config.trainer.resume,
    )

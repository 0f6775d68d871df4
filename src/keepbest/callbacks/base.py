"""The base of all callbacks: what they receive, and the hooks that the trainer calls."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from keepbest.callbacks.config import CallBackBaseConfig
from keepbest.callbacks.trainer_view import TrainerView
from keepbest.data.container import DataContainer
from keepbest.ranks import Ranks

if TYPE_CHECKING:
    from keepbest.metric_properties import MetricPropertyProvider
    from keepbest.training.counter import UpdateCounter
    from keepbest.training.log_writer import ScalarWriter
    from keepbest.training.trackers import Tracker


class CallbackBase:
    """Something that happens at fixed points of training.

    The trainer calls every hook on every rank, in the same order, with keyword arguments. An override takes those that
    it needs and `**kwargs`.

    Attributes:
        config_class: Config class of this callback. `kind` in a config may name either of the two.
        runs_last: Whether it is called after all callbacks that do not ask for this, in any order of the config.
        callback_config: Config of this callback.
        trainer: Trainer that calls the hooks.
        model: Model to evaluate and save, as wrapped by the strategy (DDP, FSDP, or not at all). This is the model in
            training, or its average with `ema_decay`; `trainer.model` is always the one in training.
        data_container: Datasets of the run.
        log_writer: Writer of scalars. It is rank-local until it is flushed.
        tracker: Tracker that receives from rank 0 what was logged.
        metric_property_provider: Provider that knows whether a higher value of a metric is better.
        ranks: This process among the ranks of the run.
        directory: Directory of the run.
    """

    config_class: ClassVar[type[CallBackBaseConfig]]
    runs_last: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A config belongs to the first callback that names it. Others that share it are chosen by `kind`.
        if "config_class" in vars(cls) and "callback_type" not in vars(cls.config_class):
            cls.config_class.callback_type = cls

    def __init__(
        self,
        callback_config: CallBackBaseConfig,
        *,
        trainer: TrainerView,
        model: nn.Module,
        data_container: DataContainer,
        log_writer: ScalarWriter,
        tracker: Tracker,
        metric_property_provider: MetricPropertyProvider,
        ranks: Ranks,
        directory: Path,
    ) -> None:
        self.callback_config = callback_config
        self.trainer = trainer
        self.model = model
        self.data_container = data_container
        self.log_writer = log_writer
        self.tracker = tracker
        self.metric_property_provider = metric_property_provider
        self.ranks = ranks
        self.directory = directory

    @property
    def state_key(self) -> str:
        """Name of this callback's state in a checkpoint; differs from that of every other callback of the run."""
        return "/".join([type(self).__name__, str(self.callback_config.interval), *self.state_key_details])

    @property
    def state_key_details(self) -> list[str]:
        """Parts of the state key after class and interval: the config's `id`, where it declares one."""
        identity: str | None = getattr(self.callback_config, "id", None)
        return [] if identity is None else [identity]

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs. **Rank-local**, and the same on every rank."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`, which stays unchanged. **Rank-local**."""

    def get_children(self) -> list[CallbackBase]:
        """Callbacks that this one calls itself. The trainer calls their tracking hooks too."""
        return []

    def before_training(self, *, update_counter: UpdateCounter, **kwargs: Any) -> None:
        """Called once, after a checkpoint was loaded and before the first update."""

    def after_training(self, *, update_counter: UpdateCounter, **kwargs: Any) -> None:
        """Called once, after the last update."""

    def track_after_accumulation_step(
        self,
        *,
        update_counter: UpdateCounter,
        batch: Any,
        losses: dict[str, Tensor],
        batch_size: int,
        accumulation_step: int,
        **kwargs: Any,
    ) -> None:
        """Called after the backward pass of every micro-batch, with its per-sample losses."""

    def track_after_update_step(
        self, *, update_counter: UpdateCounter, losses: dict[str, Tensor], batch_size: int, **kwargs: Any
    ) -> None:
        """Called after every optimizer update, before `after_update` of any callback."""

    def after_update(
        self, *, update_counter: UpdateCounter, batch_size: int, data_iter: Iterator[Any] | None = None, **kwargs: Any
    ) -> None:
        """Called after every optimizer update.

        Args:
            update_counter: Counter of the completed updates.
            batch_size: Number of samples of a micro-batch on one rank.
            data_iter: Iterator that delivers this callback's evaluation batches next; `None` if it takes none.
            **kwargs: Arguments of later versions.
        """

    def after_epoch(
        self, *, update_counter: UpdateCounter, batch_size: int, data_iter: Iterator[Any] | None = None, **kwargs: Any
    ) -> None:
        """Called after the last update of every epoch, after all callbacks' `after_update`."""

    def at_eval(
        self, *, update_counter: UpdateCounter, batch_size: int, data_iter: Iterator[Any] | None = None, **kwargs: Any
    ) -> None:
        """Called to evaluate the model as it is now, outside of the callback's own schedule."""

    def before_preemption(self, *, update_counter: UpdateCounter, batch_size: int, **kwargs: Any) -> None:
        """Called when a signal ends training, so that it can resume later. **Collective**."""

    def after_exception(
        self, *, update_counter: UpdateCounter, error: Exception, is_between_updates: bool, **kwargs: Any
    ) -> None:
        """Called when an exception ends training, on the ranks where one does. It is raised when all have returned.

        Args:
            update_counter: Counter of the completed updates.
            error: Exception.
            is_between_updates: Whether everything that training continues from is that of the last completed update.
                It is not from the forward pass of the next one on.
            **kwargs: Arguments of later versions.
        """

    def before_checkpoint(self, *, name: str) -> None:
        """Called before a resume checkpoint is written, to make durable what `state_dict` will name. **Collective**."""

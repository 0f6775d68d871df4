"""The base of all callbacks: what they are given, and the hooks that the trainer calls."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from keepbest.callbacks.config import CallBackBaseConfig
from keepbest.data.container import DataContainer
from keepbest.ranks import Ranks

if TYPE_CHECKING:
    from keepbest.metric_properties import MetricPropertyProvider
    from keepbest.training.counter import UpdateCounter
    from keepbest.training.log_writer import ScalarWriter
    from keepbest.training.trackers import Tracker


class CallbackBase:
    """Something that happens at fixed points of training.

    Every hook is called on every rank, in the same order, with keyword arguments; an override takes those that it needs
    and `**kwargs`.

    Attributes:
        config_class: the config of this callback; `kind` in a config may name either of the two.
        runs_last: whether it is called after all callbacks that do not ask for this, whatever the order in the config.
        callback_config: the config.
        trainer: who calls the hooks.
        model: the model to evaluate and save, as wrapped by the strategy (DDP, FSDP, or not at all): the one that is
            trained, or its average with `ema_decay`; `trainer.model` is the one that is trained.
        data_container: the datasets of the run.
        log_writer: where scalars are logged; rank-local until it is flushed.
        tracker: where rank 0 sends what was logged.
        metric_property_provider: tells of a metric whether higher is better.
        ranks: this process among the others.
        directory: folder of the run.
    """

    config_class: ClassVar[type[CallBackBaseConfig]]
    runs_last: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A config belongs to the first callback that names it; others that share it are chosen by `kind`.
        if "config_class" in vars(cls) and "callback_type" not in vars(cls.config_class):
            cls.config_class.callback_type = cls

    def __init__(
        self,
        callback_config: CallBackBaseConfig,
        *,
        trainer: Any,
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
        """What tells this callback from others of its class and interval: the config's `id`, where it declares one."""
        identity: str | None = getattr(self.callback_config, "id", None)
        return [] if identity is None else [identity]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to know. **Rank-local**, and the same on every rank."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, which is left as it is. **Rank-local**."""

    def get_children(self) -> list[CallbackBase]:
        """Callbacks that this one dispatches itself, for the trainer to call their tracking hooks too."""
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
        """Called after every optimizer update. `batch_size`: samples of a micro-batch on one rank."""

    def after_epoch(
        self, *, update_counter: UpdateCounter, batch_size: int, data_iter: Iterator[Any] | None = None, **kwargs: Any
    ) -> None:
        """Called after the last update of every epoch, after all callbacks' `after_update`."""

    def at_eval(
        self, *, update_counter: UpdateCounter, batch_size: int, data_iter: Iterator[Any] | None = None, **kwargs: Any
    ) -> None:
        """Called outside of training, to evaluate the model as it is now."""

    def before_preemption(self, *, update_counter: UpdateCounter, batch_size: int, **kwargs: Any) -> None:
        """Called when training ends before its time, to go on later from a resume checkpoint. **Collective**."""

    def before_checkpoint(self, *, name: str) -> None:
        """Called before a resume checkpoint is written, to make durable what `state_dict` will name. **Collective**."""

    def after_checkpoint_removed(self, *, name: str) -> None:
        """Called after a resume checkpoint was removed: nothing goes on from it any more. **Collective**."""

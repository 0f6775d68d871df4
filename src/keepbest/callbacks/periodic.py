"""Callbacks that run once every so many epochs, updates or samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from keepbest.callbacks.base import CallbackBase
from keepbest.callbacks.config import CallBackBaseConfig
from keepbest.interval import IntervalType

if TYPE_CHECKING:
    from keepbest.training.counter import UpdateCounter


class PeriodicCallback(CallbackBase, ABC):
    """Calls `periodic_callback` whenever the interval of its config has ended, and on demand by `at_eval`.

    Attributes:
        interval: Interval of the config.
    """

    def __init__(self, callback_config: CallBackBaseConfig, **kwargs: Any) -> None:
        super().__init__(callback_config, **kwargs)
        self.interval = callback_config.interval

    @abstractmethod
    def periodic_callback(
        self,
        *,
        interval_type: IntervalType,
        update_counter: UpdateCounter,
        batch_size: int,
        data_iter: Iterator[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Do the work of the interval. **Collective**: every rank calls it at the same iteration.

        Args:
            interval_type: Kind of the interval that has ended; "eval" if it is called on demand.
            update_counter: Counter of the completed updates.
            batch_size: Number of samples of a training micro-batch on one rank.
            data_iter: Iterator of the trainer that delivers this callback's evaluation batches next; `None` if it does
                not.
            **kwargs: Further arguments of the hook.
        """

    def after_update(
        self, *, update_counter: UpdateCounter, batch_size: int, data_iter: Iterator[Any] | None = None, **kwargs: Any
    ) -> None:
        if self.interval.kind != "epoch":
            self._call_if_due(update_counter, batch_size=batch_size, data_iter=data_iter, **kwargs)

    def after_epoch(
        self, *, update_counter: UpdateCounter, batch_size: int, data_iter: Iterator[Any] | None = None, **kwargs: Any
    ) -> None:
        if self.interval.kind == "epoch":
            self._call_if_due(update_counter, batch_size=batch_size, data_iter=data_iter, **kwargs)

    def at_eval(
        self, *, update_counter: UpdateCounter, batch_size: int, data_iter: Iterator[Any] | None = None, **kwargs: Any
    ) -> None:
        self.periodic_callback(
            interval_type="eval", update_counter=update_counter, batch_size=batch_size, data_iter=data_iter, **kwargs
        )

    def _call_if_due(self, update_counter: UpdateCounter, **kwargs: Any) -> None:
        if self.interval.is_due(
            update=update_counter.update,
            updates_per_epoch=update_counter.updates_per_epoch,
            effective_batch_size=update_counter.effective_batch_size,
        ):
            self.periodic_callback(interval_type=self.interval.kind, update_counter=update_counter, **kwargs)

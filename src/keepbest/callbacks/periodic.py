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
    """Calls `periodic_callback` whenever the interval of its config is over, and on demand by `at_eval`.

    Attributes:
        interval: when that is.
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
        """What is to be done at the interval. **Collective**: called on every rank at the same iteration.

        Args:
            interval_type: kind of the interval that is over; "eval" if that is not why it is called.
            update_counter: how far training has come.
            batch_size: samples of a training micro-batch on one rank.
            data_iter: the trainer's iterator, which delivers this callback's evaluation batches next; `None` if it
                does not.
            **kwargs: whatever else the hook was given.
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

"""How the trainer calls the hooks of its callbacks: in which order, with which arguments, in which precision."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch

from keepbest.callbacks.base import CallbackBase
from keepbest.callbacks.data_iterator import PeriodicDataIteratorCallback
from keepbest.data.interleaved import SamplerConfig
from keepbest.training.counter import UpdateCounter
from keepbest.training.strategy import Precision, autocast

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Hooks:
    """The hooks of all callbacks of a run. Calling one is as **collective** as the callbacks are.

    Attributes:
        callbacks: Callbacks in the order in which they are called.
        update_counter: Counter that every hook receives.
        batch_size: Number of samples of a micro-batch on one rank.
        precision: Precision of training. Callbacks evaluate the model in it.
        device: Device of the model.
    """

    callbacks: Sequence[CallbackBase]
    update_counter: UpdateCounter
    batch_size: int
    precision: Precision
    device: torch.device

    @property
    def sampler_configs(self) -> list[SamplerConfig]:
        """What the shared loader must deliver for callbacks, in their order."""
        return [callback.sampler_config for callback in self.callbacks if _takes_batches(callback)]

    def before_training(self) -> None:
        """Call `before_training`."""
        self._call(self.callbacks, "before_training")

    def after_training(self) -> None:
        """Call `after_training` of every callback, also after one that fails. Raises what the first one raised."""
        self._call_all("after_training")

    def at_eval(self) -> None:
        """Call `at_eval`."""
        self._call(self.callbacks, "at_eval", batch_size=self.batch_size)

    def before_preemption(self) -> None:
        """Call `before_preemption` of every callback, as `after_training`."""
        self._call_all("before_preemption", batch_size=self.batch_size)

    def after_exception(self, error: Exception, *, is_between_updates: bool) -> None:
        """Call `after_exception` of every callback. One that fails is logged, since `error` is raised then."""
        try:
            self._call_all("after_exception", error=error, is_between_updates=is_between_updates)
        except Exception:  # whichever it was, `error` says why training ends
            _logger.exception("a callback failed after %r, which ends training", error)

    def track(self, hook: str, **arguments: Any) -> None:
        """Call a tracking hook of the callbacks and of their children."""
        with_children = [each for callback in self.callbacks for each in (callback, *callback.get_children())]
        self._call(with_children, hook, batch_size=self.batch_size, **arguments)

    def after_update(self, data_iter: Iterator[Any]) -> None:
        """Call `after_update`, and `after_epoch` if the update ended an epoch.

        Args:
            data_iter: Iterator over the shared loader. Callbacks take their batches from it.
        """
        hooks = ["after_update", "after_epoch"] if self.update_counter.is_full_epoch else ["after_update"]
        # A resume checkpoint after an update must also hold what the callbacks do at the end of that update's epoch.
        for runs_last in (False, True):
            callbacks = [callback for callback in self.callbacks if callback.runs_last == runs_last]
            for hook in hooks:
                for callback in callbacks:
                    batches = data_iter if _takes_batches(callback) else None
                    self._call([callback], hook, batch_size=self.batch_size, data_iter=batches)

    def _call_all(self, hook: str, **arguments: Any) -> None:
        # Each of them is the last chance of a callback to make durable what it holds.
        first: Exception | None = None
        for callback in self.callbacks:
            try:
                self._call([callback], hook, **arguments)
            except Exception as error:  # raised below
                if first is not None:
                    _logger.exception("%s failed too in %s", type(callback).__name__, hook)
                first = first or error
        if first is not None:
            raise first

    def _call(self, callbacks: Sequence[CallbackBase], hook: str, **arguments: Any) -> None:
        with autocast(self.precision, self.device):
            for callback in callbacks:
                getattr(callback, hook)(update_counter=self.update_counter, **arguments)


def _takes_batches(callback: CallbackBase) -> TypeGuard[PeriodicDataIteratorCallback]:
    # Callbacks that run last are called out of the order in which the shared loader delivers.
    return isinstance(callback, PeriodicDataIteratorCallback) and not callback.runs_last

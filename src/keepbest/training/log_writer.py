"""`LogWriter`: where scalars are logged, and where the monitored metric is read from."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Protocol, cast

from torch import Tensor

from keepbest.iteration import TrainingIteration
from keepbest.training.counter import UpdateCounter
from keepbest.training.trackers import Tracker


@dataclass(frozen=True, slots=True)
class LoggedScalar:
    """A value as one rank logged it, the weight it has in a mean over ranks, and when."""

    value: float
    weight: float | None
    iteration: TrainingIteration


class ScalarWriter(Protocol):
    """What can log a scalar: a `LogWriter`, or a view of one with a prefix."""

    @property
    def log_cache(self) -> dict[str, LoggedScalar]:
        """What was logged since the last flush, under its full keys."""

    def add_scalar(self, key: str, value: float | Tensor, *, weight: float | None = None) -> None:
        """See `LogWriter.add_scalar`."""

    def prefixed(self, prefix: str) -> ScalarWriter:
        """A view that puts `prefix` before every key."""


class LogWriter:
    """Caches the scalars of this rank until they are flushed to the tracker of rank 0.

    Args:
        tracker: receives the scalars of rank 0.
        update_counter: stamps each scalar with the training iteration.
        is_main: whether this is rank 0.
    """

    def __init__(self, tracker: Tracker, update_counter: UpdateCounter, *, is_main: bool) -> None:
        self._log_cache: dict[str, LoggedScalar] = {}
        self._tracker = tracker
        self._update_counter = update_counter
        self._is_main = is_main

    @property
    def log_cache(self) -> dict[str, LoggedScalar]:
        """What this rank logged since the last flush, by key."""
        return self._log_cache

    def add_scalar(self, key: str, value: float | Tensor, *, weight: float | None = None) -> None:
        """Log `value` at the current iteration; a later value of the same key replaces it. Rank-local.

        NaN, infinities and odd weights are accepted here: whoever monitors the key judges them, on all ranks together.

        Args:
            key: for example `loss/val/total`.
            value: a number, or a tensor with one element (of any dtype, on any device).
            weight: what this rank's value counts in a mean over ranks, usually its number of samples.

        Raises:
            TypeError: if `value` is no number.
        """
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise TypeError(f"{key!r}: expected a scalar, got a tensor of shape {tuple(value.shape)}")
        elif not isinstance(cast("object", value), Real):
            raise TypeError(f"{key!r}: expected a number, got {type(value).__name__}")
        self._log_cache[key] = LoggedScalar(
            value=float(value),
            weight=None if weight is None else float(weight),
            iteration=self._update_counter.iteration,
        )

    def prefixed(self, prefix: str) -> ScalarWriter:
        """A view that puts `prefix` before every key; same cache, same tracker. Rank-local."""
        return _PrefixedWriter(self, prefix)

    def flush(self) -> None:
        """Hand the cached scalars to the tracker, one record for each iteration, and forget them. Rank-local.

        Raises:
            OSError: on rank 0, if the tracker cannot write.
        """
        cached, self._log_cache = self._log_cache, {}
        if not self._is_main:
            return
        records: dict[TrainingIteration, dict[str, float]] = {}
        for key, scalar in cached.items():
            records.setdefault(scalar.iteration, {})[key] = scalar.value
        for iteration, scalars in records.items():
            self._tracker.log(iteration, scalars)


@dataclass(frozen=True, slots=True)
class _PrefixedWriter:
    writer: ScalarWriter
    prefix: str

    @property
    def log_cache(self) -> dict[str, LoggedScalar]:
        return self.writer.log_cache

    def add_scalar(self, key: str, value: float | Tensor, *, weight: float | None = None) -> None:
        self.writer.add_scalar(self.prefix + key, value, weight=weight)

    def prefixed(self, prefix: str) -> ScalarWriter:
        return _PrefixedWriter(self, prefix)

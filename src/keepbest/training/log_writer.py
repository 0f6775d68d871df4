"""`LogWriter`: where scalars are logged, and where the monitored metric is read from."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass
from numbers import Real
from typing import Protocol, cast

from torch import Tensor

from keepbest.iteration import TrainingIteration
from keepbest.training.counter import UpdateCounter
from keepbest.training.trackers import Tracker

_logger = logging.getLogger(__name__)
_MOST_UNWRITTEN = 10_000  # records of an update or an epoch: some MB


@dataclass(frozen=True, slots=True)
class LoggedScalar:
    """A value that one rank logged.

    Attributes:
        value: Value as a float64.
        weight: Weight of the value in a mean over ranks; `None` if all ranks count the same.
        iteration: Iteration at which it was logged.
    """

    value: float
    weight: float | None
    iteration: TrainingIteration


class ScalarWriter(Protocol):
    """Anything that can log a scalar: a `LogWriter`, or a view of one with a prefix."""

    @property
    def log_cache(self) -> dict[str, LoggedScalar]:
        """What this rank logged since the last flush, by full key. **Rank-local**."""

    def add_scalar(self, key: str, value: float | Tensor, *, weight: float | None = None) -> None:
        """Log `value` at the current iteration, as `LogWriter.add_scalar` does. **Rank-local**."""

    def prefixed(self, prefix: str) -> ScalarWriter:
        """A view that puts `prefix` before every key. **Rank-local**."""


class LogWriter:
    """Caches the scalars of this rank until they are flushed to the tracker of rank 0.

    Args:
        tracker: Tracker that receives the scalars of rank 0.
        update_counter: Counter that stamps each scalar with the training iteration.
        is_main: Whether this is rank 0.
    """

    def __init__(self, tracker: Tracker, update_counter: UpdateCounter, *, is_main: bool) -> None:
        self._log_cache: dict[str, LoggedScalar] = {}
        self._tracker = tracker
        self._update_counter = update_counter
        self._is_main = is_main
        self._unwritten: deque[tuple[TrainingIteration, dict[str, float]]] = deque()  # by rank 0
        self._dropped: list[TrainingIteration] = []  # the first and the last one of those that were too many
        self._dropped_records = 0
        self._refusal: OSError | None = None

    @property
    def log_cache(self) -> dict[str, LoggedScalar]:
        """What this rank logged since the last flush, by key. **Rank-local**."""
        return self._log_cache

    def add_scalar(self, key: str, value: float | Tensor, *, weight: float | None = None) -> None:
        """Log `value` at the current iteration. A later value of the same key replaces it. **Rank-local**.

        NaN, infinities and invalid weights are accepted here. The callback that monitors the key judges them, on all
        ranks together.

        Args:
            key: Key of the scalar, for example `loss/val/total`.
            value: Number, or tensor with one element (of any dtype, on any device).
            weight: Weight of this rank's value in a mean over ranks, usually its number of samples.

        Raises:
            TypeError: If `value` is not a number.
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
        """A view that puts `prefix` before every key, with the same cache and tracker. **Rank-local**."""
        return _PrefixedWriter(self, prefix)

    def flush(self) -> None:
        """Pass the cached scalars to the tracker, one record for each iteration, and clear the cache. **Rank-local**.

        What the file system refuses is a warning, once, since rank 0 alone writes and the others are in the next
        update. The newest 10,000 of these records go to the tracker once it can write. A warning then says how many it
        lacks, if there were more.
        """
        cached, self._log_cache = self._log_cache, {}
        if not self._is_main:
            return
        records: dict[TrainingIteration, dict[str, float]] = {}
        for key, scalar in cached.items():
            records.setdefault(scalar.iteration, {})[key] = scalar.value
        self._unwritten += records.items()
        before = self._refusal
        self._write()
        if self._refusal is not None and before is None:
            _logger.warning(
                "what is logged cannot be written, and the newest %d records are kept until it can be: %s",
                _MOST_UNWRITTEN,
                self._refusal,
            )

    def close(self) -> None:
        """Close the tracker. A warning says so if it lacks records that still cannot be written. **Rank-local**."""
        try:
            self._write()
            if self._refusal is not None:
                _logger.warning(
                    "of what was logged %d records could not be written, and are lost: %s",
                    self._dropped_records + len(self._unwritten),
                    self._refusal,
                )
        finally:
            self._unwritten.clear()
            self._tracker.close()

    def _write(self) -> None:
        self._refusal = None
        try:
            while self._unwritten:
                self._tracker.log(*self._unwritten[0])
                self._unwritten.popleft()
        except OSError as error:
            self._refusal = error
            self._drop_the_oldest()
        else:
            self._report_dropped()

    def _drop_the_oldest(self) -> None:
        while len(self._unwritten) > _MOST_UNWRITTEN:
            iteration, _ = self._unwritten.popleft()
            self._dropped = [*self._dropped[:1], iteration]
            self._dropped_records += 1

    def _report_dropped(self) -> None:
        if self._dropped:
            _logger.warning(
                "what is logged can be written again. It lacks %d records, those of %s to %s, since no more than %d "
                "were kept",
                self._dropped_records,
                self._dropped[0],
                self._dropped[-1],
                _MOST_UNWRITTEN,
            )
        self._dropped, self._dropped_records = [], 0


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

"""A metric among those that Lightning has logged: its value, and whether it was logged anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from keepbest.metric import Reading, read_reported
from keepbest.misspelling import nearest


class LoggedMetric:
    """A metric of `trainer.callback_metrics`, where Lightning leaves a value until it is logged again. **Rank-local**.

    Args:
        key: Name under which it is logged.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        self._before: Any = None  # value that was logged before the present interval

    def begin_interval(self, metrics: Mapping[str, Any]) -> None:
        """From now on the value in `metrics`, if there is one, is of an earlier interval."""
        self._before = metrics.get(self._key)

    def read(self, metrics: Mapping[str, Any], interval: str) -> Reading:
        """The value of the present interval, or why there is none.

        Args:
            metrics: What Lightning shows to callbacks.
            interval: Interval in words, such as "validation".
        """
        if self._key not in metrics:
            logged, near = ", ".join(sorted(metrics)) or "nothing", nearest(self._key, metrics)
            absent = f"{self._key!r} was not logged by the end of {interval}; logged: {logged}{near}"
            return Reading(absent=absent)
        if _is_same(metrics[self._key], self._before):
            return Reading(
                absent=f"{self._key!r} was logged before, but not again by the end of {interval}: Lightning "
                "still has the value of other weights. Log it each time, or observe it only where it is logged"
            )
        return read_reported(metrics[self._key], self._key)


def _is_same(value: Any, before: Any) -> bool:
    """Whether this is what was logged before, by its place in memory, since Lightning makes new views of it."""
    if not (isinstance(value, torch.Tensor) and isinstance(before, torch.Tensor)):
        return False
    # While the former is held nothing else takes its place. Tensors without one have 0.
    return value is before or value.data_ptr() == before.data_ptr() != 0

"""The evaluations that the Trainer shows to callbacks, and the metric in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from keepbest.integrations.transformers_arguments import PREFIX
from keepbest.metric import Reading, read_reported
from keepbest.misspelling import nearest

# Every evaluation reports its time. Of several data sets each has a name of its own in place of this one.
_ONLY_EVALUATION = "eval_runtime"
_HIDES = (
    "an evaluate() of your own must call self.callback_handler.on_evaluate with its metrics, or nothing is observed"
)
_CANCELS = (
    "an evaluate() that a hook of a callback calls cancels that of the Trainer, unless the hook returns a copy of "
    "control from before"
)


class Evaluations:
    """What the Trainer has shown of its evaluations since the last step. **Rank-local**.

    Several data sets are evaluated one by one, and any of them may report the metric. Somebody may also evaluate other
    data beside the training. So it is known at the next step only that the metric was in none of them.

    Attributes:
        has_stepped: Whether there was a step in this training.
        is_due: Whether there was one since the last observation.
    """

    def __init__(self) -> None:
        self.has_stepped = self._has_observed = False
        self._await(due=False)

    def step(self) -> None:
        """From now on an evaluation has something new to observe."""
        self.has_stepped = True
        self._await(due=True)

    def schedule(self, is_scheduled: bool) -> None:
        """The Trainer means to evaluate after this step, if `is_scheduled`."""
        self._is_scheduled |= is_scheduled

    def log(self, keys: Iterable[str]) -> None:
        """The Trainer has logged values under these names."""
        self._is_logged |= any(key.startswith(PREFIX) for key in keys)

    def add(self, metrics: Mapping[str, Any]) -> None:
        """One of several evaluations has reported these, and not the metric."""
        self._reported.update(key for key in metrics if key.startswith(PREFIX))
        self._beside.update(metrics)

    def end(self) -> None:
        """The metric is observed, so nothing is due until the next step."""
        self._has_observed = True
        self._await(due=False)

    def names_without_metric(self) -> set[str]:
        """The names that all evaluations since the last step have reported, where the metric should be among them."""
        # What somebody evaluates beside the training is no reason, unless all that was to be evaluated is there. Later
        # it may have cancelled an evaluation of the training.
        return self._reported or (set() if self._has_observed else self._only_beside)

    def why_unseen(self) -> str:
        """Why no callback was shown an evaluation that was to take place; empty where there seems to be none."""
        if self._only_beside:
            return _CANCELS
        # A callback of the user may have cancelled the evaluation, but nobody logs one that was not.
        return _HIDES if self.is_due and self._is_scheduled and self._is_logged else ""

    @property
    def _only_beside(self) -> set[str]:
        return self._beside if self._is_scheduled else set()

    def _await(self, *, due: bool) -> None:
        self.is_due = due
        self._is_scheduled = self._is_logged = False
        self._reported: set[str] = set()  # by evaluations of the training
        self._beside: set[str] = set()  # by any


def is_only_evaluation(metrics: Mapping[str, Any]) -> bool:
    """Whether this is the whole evaluation of the training, and not that of one of several data sets, or of others."""
    return _ONLY_EVALUATION in metrics


def read_metric(metric_key: str, metrics: Mapping[str, Any]) -> Reading:
    """The value of the metric in an evaluation, or why there is none."""
    if metric_key not in metrics:
        reported, near = ", ".join(sorted(metrics)), nearest(metric_key, metrics)
        absent = f"{metric_key!r} was not reported by the evaluation; reported: {reported}{near}"
        is_beside = not any(key.startswith(PREFIX) for key in metrics)
        return Reading(absent=f"{absent}. Also, {_CANCELS}" if is_beside else absent)
    return read_reported(metrics[metric_key], metric_key)

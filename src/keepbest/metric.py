"""From what each rank logged to one value that every rank agrees on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, SupportsFloat, runtime_checkable

import torch

from keepbest.errors import InvalidMetricError, MetricMismatchError, MissingMetricError
from keepbest.iteration import TrainingIteration
from keepbest.ranks import Number, Ranks

MetricReduction = Literal["mean", "sum", "min", "max", "rank0", "identical"]


@runtime_checkable
class Computable(Protocol):
    """A metric that was updated with batches and gives its value when it is asked: that of torchmetrics."""

    def compute(self) -> Any: ...
    def reset(self) -> None: ...


class LoggedScalar(Protocol):
    """An entry of a log cache: what `LogWriter.add_scalar` remembers."""

    @property
    def value(self) -> float: ...
    @property
    def weight(self) -> float | None: ...
    @property
    def iteration(self) -> TrainingIteration: ...


@dataclass(frozen=True, slots=True)
class Reading:
    """What this rank holds of the metric: a number, or the reason why there is none (`absent`).

    A number that `is_reduced` is that of all ranks already.
    """

    value: float | None = None
    weight: float | None = None
    absent: str = ""
    is_reduced: bool = False


def read_value(value: Any, weight: Any = None, *, metric_key: str = "") -> Reading:
    """A reading from a number of any kind: Python, numpy, or a tensor with one element. **Rank-local**.

    From a `torchmetrics.Metric` or `MetricCollection` too, whose `compute` synchronizes the ranks, unless it was told
    not to; it is then **collective**. And from a function without arguments that gives any of these.

    Args:
        value: `None` where this rank has no value.
        metric_key: which metric of a collection is asked for.
        weight: how much this rank counts in a mean or sum, for example its number of samples; `None` where all count
            the same.

    Raises:
        InvalidMetricError: if `value` or `weight` is not a real number, or the weight is negative or not finite, or a
            collection has no metric of this name.
    """
    is_reduced = False
    if callable(value) and not isinstance(value, torch.Tensor):
        if not isinstance(value, Computable):
            return read_value(value(), weight, metric_key=metric_key)
        is_reduced = bool(getattr(value, "sync_on_compute", True))
        value = _computed(value, metric_key)
    number = None if value is None else _real(value, "metric")
    weighed = None if weight is None else _real(weight, "weight of the metric")
    if weighed is not None and not 0.0 <= weighed < math.inf:
        raise InvalidMetricError(f"the weight of the metric must be finite and >= 0, got {weighed!r}")
    return Reading(number, weighed, "" if number is not None else "observe() was given None", is_reduced)


def _computed(metric: Computable, metric_key: str) -> Any:
    """The value of a metric; of a collection, that of the metric of this name, or of the last part of it."""
    value = metric.compute()
    if not isinstance(value, Mapping):
        return value
    for name in (metric_key, metric_key.rpartition("/")[2]):
        if name in value:
            return value[name]
    raise InvalidMetricError(f"the collection has no metric {metric_key!r}; it has: {', '.join(map(str, value))}")


def read_scalar(log_cache: Mapping[str, LoggedScalar], metric_key: str, iteration: TrainingIteration) -> Reading:
    """The reading of `metric_key` that was logged at `iteration`. **Rank-local**.

    Raises:
        InvalidMetricError: as `read_value`.
    """
    entry = log_cache.get(metric_key)
    if entry is None:
        known = ", ".join(sorted(log_cache)) or "none: the log cache is empty"
        return Reading(absent=f"metric key {metric_key!r} was not logged at {iteration}; logged keys: {known}")
    if entry.iteration != iteration:
        return Reading(absent=f"metric key {metric_key!r} was last logged at {entry.iteration}, not at {iteration}")
    return read_value(entry.value, entry.weight)


class AgreedMetric(NamedTuple):
    """The value that all ranks decide by, and what rank 0 had to tell."""

    value: float
    note: str


def agree_on_metric(
    ranks: Ranks,
    metric_key: str,
    read: Callable[[], Reading],
    reduction: MetricReduction,
    *,
    failure: BaseException | None = None,
    note: str = "",
    state: bytes = b"",
) -> AgreedMetric:
    """One value from all ranks' readings, bit-equal on every rank. **Collective**: one exchange where all is well.

    Args:
        ranks: who agrees.
        metric_key: for messages.
        read: gets the reading of this rank; what it raises is raised on every rank.
        reduction: how the values become one. Weights count in `mean` and `sum`; a rank of weight 0 is ignored.
        failure: something that went wrong on this rank before; every rank raises it.
        note: what rank 0 tells the others, at the cost of a second exchange.
        state: bytes that must be equal on all ranks.

    Raises:
        MissingMetricError: on every rank, if a rank that is needed has no value; names these ranks.
        InvalidMetricError: if all weights are 0, or some ranks gave a weight and others did not.
        MetricMismatchError: if the reduction is `identical` and the values are not.
        RanksError: see `Ranks.exchange`.
    """
    step = f"observe {metric_key}"
    reading = Reading()
    try:
        reading = read()
    except BaseException as error:  # noqa: BLE001  # raised again by exchange, on every rank
        failure = failure or error
    # A sum over ranks must not be taken of what is the sum already; and all of them must see it so.
    if reading.is_reduced and reduction == "sum":
        reduction, state = "identical", state + b", summed by the metric itself"
    numbers = ranks.exchange(step, Number(reading.value, reading.weight, note), failure=failure, state=state)
    needed = numbers[:1] if reduction == "rank0" else numbers
    if any(number.value is None and number.weight != 0.0 for number in needed):
        reasons = ranks.gather_json(step, lambda: reading.absent)
        lines = "\n".join(
            f"  rank {rank}: {reasons[rank]}"
            for rank, number in enumerate(needed)
            if number.value is None and number.weight != 0.0
        )
        raise MissingMetricError(
            f"the monitored metric {metric_key!r} is missing on {lines.count('  rank ')} of {ranks.world_size} ranks:\n"
            f"{lines}\nIt must be there on each, at this iteration and before it is looked at: a callback of the "
            "trainer that logs it needs the same every_n_* and an earlier place in the list."
        )
    return AgreedMetric(reduce_numbers(needed, reduction), numbers[0].note)


def reduce_numbers(numbers: Sequence[Number], reduction: MetricReduction) -> float:
    """One float64 from the numbers of the ranks, by rank. Pure.

    Equal values reduce to exactly that value (but for `sum`). NaN on a rank that counts gives NaN.

    Raises:
        InvalidMetricError, MetricMismatchError: see `agree_on_metric`.
    """
    values, weights = _values_that_count(numbers)
    if reduction == "identical":
        if not _all_same(values):
            lines = "\n".join(f"  rank {rank}: {number.value!r}" for rank, number in enumerate(numbers))
            raise MetricMismatchError(f"metric_reduction is 'identical', but the ranks hold different values:\n{lines}")
        return values[0]
    if any(map(math.isnan, values)):
        return math.nan
    if reduction == "min":
        return min(values)
    if reduction == "max":
        return max(values)
    if reduction == "sum":
        return _sum([value * weight for value, weight in zip(values, weights, strict=True)])
    if _all_same(values):
        return values[0]
    whole = math.fsum(weights)
    total = _sum([value * weight for value, weight in zip(values, weights, strict=True)])
    if math.isinf(total) and all(map(math.isfinite, values)):
        return math.fsum(value * (weight / whole) for value, weight in zip(values, weights, strict=True))
    return total / whole


def _values_that_count(numbers: Sequence[Number]) -> tuple[list[float], list[float]]:
    given = [number.weight is not None for number in numbers]
    if True in given and False in given:
        without = [rank for rank, has_weight in enumerate(given) if not has_weight]
        raise InvalidMetricError(
            f"the metric has a weight on some ranks only, not on ranks {without}; give weight= on every rank or on none"
        )
    weights = [1.0 if number.weight is None else number.weight for number in numbers]
    pairs = [
        (number.value, weight)
        for number, weight in zip(numbers, weights, strict=True)
        if weight > 0.0 and number.value is not None
    ]
    if not pairs:
        raise InvalidMetricError("the weight of the metric is 0 on every rank: there is nothing to reduce")
    return [value for value, _ in pairs], [weight for _, weight in pairs]


def _all_same(values: list[float]) -> bool:
    return values.count(values[0]) == len(values) or all(map(math.isnan, values))


def _sum(terms: Sequence[float]) -> float:
    if not all(map(math.isfinite, terms)):
        return sum(terms)
    try:
        return math.fsum(terms)
    except OverflowError:
        return math.copysign(math.inf, math.fsum(term / len(terms) for term in terms))


def _real(value: Any, what: str) -> float:
    if type(value) is float:  # the usual case, in the quiet interval that is to cost nothing
        return value
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
            got = f"a {value.dtype} tensor of shape {tuple(value.shape)}"
            raise InvalidMetricError(f"the {what} must be one real number, got {got}")
        return float(value.item())
    if isinstance(value, SupportsFloat) and not isinstance(value, bool | str | bytes):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidMetricError(f"the {what} must be one real number, got {value!r}: {error}") from error
    raise InvalidMetricError(f"the {what} must be a number, got {value!r} of type {type(value).__name__}")

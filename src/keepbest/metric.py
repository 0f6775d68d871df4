"""The monitored metric: from what each rank logged to one value that every rank agrees on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, SupportsFloat, runtime_checkable

import torch

from keepbest.errors import InvalidMetricError, MissingMetricError
from keepbest.iteration import TrainingIteration
from keepbest.misspelling import nearest
from keepbest.modules.kinds import is_dtensor, is_fake
from keepbest.ranks import NO_REMEDY, Number, Ranks
from keepbest.reduction import MetricReduction, reduce_numbers

DEFAULT_REMEDY = "Each of these ranks needs a value at each interval; with metric_reduction='rank0', rank 0 alone does."
# Of what is read from the log of keepbest's own trainer.
LOG_REMEDY = (
    "Each of these ranks must log it at this iteration, before it is observed: a callback of the trainer that logs it "
    "needs the same every_n_* and an earlier place in the list."
)


@runtime_checkable
class Computable(Protocol):
    """A metric that was updated with batches and computes its value on demand, as those of torchmetrics do."""

    def compute(self) -> Any: ...
    def reset(self) -> None: ...


class LoggedScalar(Protocol):
    """An entry of a log cache, as `LogWriter.add_scalar` makes it."""

    @property
    def value(self) -> float: ...
    @property
    def weight(self) -> float | None: ...
    @property
    def iteration(self) -> TrainingIteration: ...


@dataclass(frozen=True, slots=True)
class Reading:
    """The metric on this rank: a number, or the reason why there is none.

    Attributes:
        value: Value on this rank; `None` if there is none.
        weight: Weight of the value; `None` if all ranks count the same.
        absent: Reason why there is no value.
        is_reduced: Whether the value is that of all ranks already.
    """

    value: float | None = None
    weight: float | None = None
    absent: str = ""
    is_reduced: bool = False


def read_value(value: Any, weight: Any = None, *, metric_key: str = "") -> Reading:
    """Return the reading of a value that was passed to `observe`. **Rank-local**, except with a metric of torchmetrics.

    The `compute` of a `torchmetrics.Metric` or `MetricCollection` synchronizes the ranks, unless `sync_on_compute` is
    off. The reading is then **collective**.

    Args:
        value: Number from Python or numpy, tensor or array with one element, mapping with the metric under its key,
            metric or collection of torchmetrics, or function without arguments that returns one of these. `None` if
            this rank has no value.
        weight: Weight of this rank in a mean or sum, for example its number of samples; `None` if all ranks count the
            same.
        metric_key: Key of the metric in a mapping or collection.

    Raises:
        InvalidMetricError: If `value` or `weight` is not a real number, the weight is negative or not finite, or a
            collection has no metric with this key.
    """
    is_reduced = False
    if callable(value) and not isinstance(value, torch.Tensor):
        if not isinstance(value, Computable):
            return read_value(value(), weight, metric_key=metric_key)
        is_reduced = bool(getattr(value, "sync_on_compute", True))
        value = _computed(value, metric_key)
    elif isinstance(value, Mapping):
        if (name := _name_in(value, metric_key)) is None:
            known = ", ".join(map(str, value)) or "nothing"
            near = nearest(metric_key, map(str, value))
            return Reading(absent=f"observe() received a mapping without {metric_key!r}; it has: {known}{near}")
        value = value[name]
    number = None if value is None else _real(value, "metric")
    weighed = None if weight is None else _real(weight, "weight of the metric")
    if weighed is not None and not 0.0 <= weighed < math.inf:
        raise InvalidMetricError(f"the weight of the metric must be finite and >= 0, got {weighed!r}")
    return Reading(number, weighed, "" if number is not None else "observe() received None", is_reduced)


def read_reported(value: Any, metric_key: str) -> Reading:
    """Return the reading of a number that a framework reports under the name of the metric. **Rank-local**.

    Raises:
        InvalidMetricError: If `value` is anything else, such as a mapping in the place of the number in it.
    """
    if value is None:
        return Reading(absent=f"{metric_key!r} was reported as None")
    return Reading(_real(value, f"metric {metric_key!r}"))


def _computed(metric: Computable, metric_key: str) -> Any:
    """The value of a metric. In a collection, that of the metric with this key, or with the last part of the key."""
    value = metric.compute()
    if not isinstance(value, Mapping):
        return value
    if (name := _name_in(value, metric_key)) is None:
        known, near = ", ".join(map(str, value)), nearest(metric_key, map(str, value))
        raise InvalidMetricError(f"the collection has no metric {metric_key!r}; it has: {known}{near}")
    return value[name]


def _name_in(values: Mapping[Any, Any], metric_key: str) -> str | None:
    return next((name for name in (metric_key, metric_key.rpartition("/")[2]) if name in values), None)


def read_scalar(log_cache: Mapping[str, LoggedScalar], metric_key: str, iteration: TrainingIteration) -> Reading:
    """Return the reading of `metric_key` that was logged at `iteration`. **Rank-local**.

    Raises:
        InvalidMetricError: If the logged weight is negative or not finite.
    """
    entry = log_cache.get(metric_key)
    if entry is None:
        known = ", ".join(sorted(log_cache)) or "none: the log cache is empty"
        near = nearest(metric_key, log_cache)
        return Reading(absent=f"metric key {metric_key!r} was not logged at {iteration}; logged keys: {known}{near}")
    if entry.iteration != iteration:
        return Reading(absent=f"metric key {metric_key!r} was last logged at {entry.iteration}, not at {iteration}")
    return read_value(entry.value, entry.weight)


class AgreedMetric(NamedTuple):
    """The value by which all ranks decide.

    Attributes:
        value: Reduced value, with the same bits on every rank.
        note: Text from rank 0.
    """

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
    saving: bool = False,
    remedy: str = DEFAULT_REMEDY,
) -> AgreedMetric:
    """Return one value from all ranks' readings, with the same bits on every rank. **Collective**.

    It takes one exchange, unless a rank lacks the metric or rank 0 has a note.

    Args:
        ranks: Ranks that agree.
        metric_key: Key of the metric, for messages.
        read: Function that returns the reading of this rank. What it raises is raised on every rank.
        reduction: Way in which the values become one. Weights count in `mean` and `sum`. A rank of weight 0 is ignored.
        failure: Earlier failure of this rank, as of its storage, which every rank raises.
        note: Text from rank 0 to the others. It costs a second exchange.
        state: Bytes that must be equal on all ranks.
        saving: Whether rank 0 may still be writing, so that the others wait for `save_timeout`.
        remedy: What to do where a rank lacks the metric.

    Raises:
        MissingMetricError: On every rank, if a rank that is needed has no value. It names these ranks.
        InvalidMetricError: On every rank, if all weights are 0, or some ranks gave a weight and others did not.
        MetricMismatchError: On every rank, if the reduction is `identical` and the values are not.
        RanksError: On every rank, if a rank failed, does not arrive, or is in another step. See `Ranks.exchange`.
    """
    step = f"observe {metric_key}"
    reading, storage = Reading(), None if failure is None else NO_REMEDY  # what is read is of the user
    try:
        reading = read()
    except BaseException as error:  # noqa: BLE001  # raised again by exchange, on every rank
        failure = failure or error
    # What is the sum over ranks already must not be summed again, and all ranks must agree that it is.
    if reading.is_reduced and reduction == "sum":
        reduction, state = "identical", state + b", summed by the metric itself"
    mine = Number(reading.value, reading.weight, note)
    numbers = ranks.exchange(step, mine, failure=failure, remedy=storage, state=state, saving=saving)
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
            f"{lines}\n{remedy}"
        )
    return AgreedMetric(reduce_numbers(needed, reduction), numbers[0].note)


def _real(value: Any, what: str) -> float:
    if type(value) is float:  # the usual case, in a quiet interval that should cost nothing
        return value
    if isinstance(value, torch.Tensor):
        return _real_of_tensor(value, what)
    if hasattr(value, "dtype") and hasattr(value, "item"):
        return _real_of_array(value, what)
    if isinstance(value, SupportsFloat) and not isinstance(value, bool | str | bytes):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidMetricError(f"the {what} must be one real number, got {value!r}: {error}") from error
    raise InvalidMetricError(f"the {what} must be a number, got {value!r} of type {type(value).__name__}")


def _real_of_tensor(value: torch.Tensor, what: str) -> float:
    if is_dtensor(value):  # of which each rank may hold something else
        placements = tuple(value.placements)
        if not all(placement.is_replicate() for placement in placements):
            raise InvalidMetricError(
                f"the {what} must be one real number, got a DTensor with the placements {placements}, of which each "
                "rank holds a part; call its full_tensor() on every rank and pass that"
            )
        value = value.to_local()
    place = " on the meta device" if value.is_meta else " of FakeTensorMode" if is_fake(value) else ""
    if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool or place:
        got = f"a {value.dtype} tensor of shape {tuple(value.shape)}{place}"
        raise InvalidMetricError(f"the {what} must be one real number, got {got}")
    return float(value.item())


def _real_of_array(value: Any, what: str) -> float:
    """The number in a scalar or array of numpy, or of a library that has the same attributes."""
    shape = tuple(getattr(value, "shape", ()))
    if math.prod(shape) != 1 or str(value.dtype).startswith(("bool", "complex", "datetime", "timedelta")):
        raise InvalidMetricError(f"the {what} must be one real number, got a {value.dtype} array of shape {shape}")
    mask = getattr(value, "mask", None)  # of a masked array; the same word is a method elsewhere
    if mask is not None and not callable(mask) and bool(mask):
        raise InvalidMetricError(f"the {what} must be one real number, got a masked one, which has no value")
    number = value.item()
    if isinstance(number, bool | str | bytes) or not isinstance(number, SupportsFloat):
        raise InvalidMetricError(f"the {what} must be one real number, got {value!r} of dtype {value.dtype}")
    return float(number)

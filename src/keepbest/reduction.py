"""How the numbers of the ranks become one, in float64 and with the same bits on every rank. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from keepbest.errors import InvalidMetricError, MetricMismatchError
from keepbest.ranks import Number

MetricReduction = Literal["mean", "sum", "min", "max", "rank0", "identical"]


def reduce_numbers(numbers: Sequence[Number], reduction: MetricReduction) -> float:
    """Reduce the numbers of the ranks to one float64.

    Equal values reduce to exactly that value, except with `sum`. NaN on a rank that counts gives NaN.

    Args:
        numbers: Numbers by rank.
        reduction: Way in which they become one.

    Raises:
        InvalidMetricError: If all weights are 0, or some ranks gave a weight and others did not.
        MetricMismatchError: If the reduction is `identical` and the values are not.
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
    if any(map(math.isinf, values)):
        return values[0] if _all_same(values) else sum(filter(math.isinf, values))
    if reduction == "sum":
        return _sum(values, weights)
    return values[0] if _all_same(values) else _mean(values, weights)


def _values_that_count(numbers: Sequence[Number]) -> tuple[list[float], list[float]]:
    given = [number.weight is not None for number in numbers]
    if True not in given and (values := [number.value for number in numbers if number.value is not None]):
        return values, [1.0] * len(values)
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


def _sum(values: Sequence[float], weights: Sequence[float]) -> float:
    if _is_moderate([*values, *weights]):
        return math.fsum(value * weight for value, weight in zip(values, weights, strict=True))
    exact = _exact_sum(values, weights)
    try:
        return float(exact)
    except OverflowError:
        return math.inf if exact > 0 else -math.inf


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    if _is_moderate([*values, *weights]):
        return math.fsum(value * weight for value, weight in zip(values, weights, strict=True)) / math.fsum(weights)
    return float(_exact_sum(values, weights) / sum(map(Fraction, weights)))


def _exact_sum(values: Sequence[float], weights: Sequence[float]) -> Fraction:
    return sum((Fraction(value) * Fraction(weight) for value, weight in zip(values, weights, strict=True)), Fraction())


def _is_moderate(numbers: Sequence[float]) -> bool:
    """Whether no product or sum of these can leave the range of float64. Otherwise fractions are slow, but right."""
    return all(number == 0.0 or 1e-150 < abs(number) < 1e150 for number in numbers)

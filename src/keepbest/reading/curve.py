"""The history of one metric in a ledger, prepared for pictures and tables. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from keepbest.decision import Best, BestState
from keepbest.iteration import TrainingIteration
from keepbest.run.history import KeeperHistory
from keepbest.run.timeline import Timeline, TimelineEntry

_UNITS = ("batch", "update", "epoch", "sample")
_HIGHEST = 1e300  # the distance of two values, and the margins, must be numbers too
_FEWEST = 8  # points of which some are hidden by others
_LARGEST_SHARE = 0.4  # of the height, from which on no close-up is needed


@dataclass(frozen=True, slots=True)
class Point:
    """One observation.

    Attributes:
        iteration: Iteration at which it was observed.
        value: Value of the metric, possibly NaN or infinite.
        is_new_best: Whether it was a new best in its timeline.
    """

    iteration: TrainingIteration
    value: float
    is_new_best: bool


@dataclass(frozen=True, slots=True)
class KeptByTolerance:
    """What early stopping with some tolerance keeps.

    Attributes:
        tolerance: Number of intervals in a row without improvement that do not end training.
        kept: Best at the moment when the tolerance was exceeded, or the present best; `None` if there is none.
        exceeded_at: Iteration at which it was exceeded; `None` if it was not.
    """

    tolerance: int
    kept: Best | None
    exceeded_at: TrainingIteration | None


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric of a run.

    Attributes:
        keeper: Name of the keeper.
        metric_key: Key of the metric that it monitors.
        higher_is_better: Direction of the metric.
        unit: Unit of the axis of iterations: the finest one that all of them have.
        points: Points of the present timeline.
        abandoned: Points of other timelines that the next timeline does not share.
        restarts: Last iterations before each restart in the present timeline.
        tolerances: What each tolerance of the keeper itself keeps.
        best: Best of the present timeline; `None` if there is none.
        top: Best values that are kept, the best first; empty if only the best is kept.
    """

    keeper: str
    metric_key: str
    higher_is_better: bool
    unit: str
    points: list[Point]
    abandoned: list[list[Point]]
    restarts: list[TrainingIteration]
    tolerances: list[KeptByTolerance]
    best: Best | None
    top: tuple[Best, ...]

    def position(self, iteration: TrainingIteration) -> int:
        """Return the position of `iteration` on the axis."""
        place: int | None = getattr(iteration, self.unit)
        return 0 if place is None else place


def curve(name: str, keeper: KeeperHistory) -> Curve:
    """Return the curve of one keeper that has observed something."""
    present = keeper.present
    first = present.entries[0].observation.iteration
    unit = next(unit for unit in _UNITS if getattr(first, unit) is not None)
    abandoned: list[list[Point]] = []
    restarts: list[TrainingIteration] = []
    for timeline, following in zip(keeper.timelines, keeper.timelines[1:], strict=False):
        shared = _shared(timeline.entries, following.entries)
        if beyond := timeline.entries[shared:]:
            abandoned.append(_points(keeper, timeline)[len(timeline.entries) - len(beyond) :])
        if shared and _shared(timeline.entries[:shared], present.entries) == shared:
            restarts.append(timeline.entries[shared - 1].observation.iteration)
    state = present.state(keeper.policy, until=present.last_iteration)
    return Curve(
        keeper=name,
        metric_key=keeper.metric_key,
        higher_is_better=keeper.policy.higher_is_better,
        unit=unit,
        points=_points(keeper, present),
        abandoned=abandoned,
        restarts=restarts,
        tolerances=kept_by_tolerances(keeper, keeper.policy.tolerances),
        best=state.best,
        top=state.top,
    )


def has_height(value: float) -> bool:
    """Whether a value has a place in a picture; others are drawn at its edge."""
    return abs(value) <= _HIGHEST


def close_up(curve: Curve) -> tuple[float, float] | None:
    """Return the range of values in which the bests are decided, where the picture of all would hide it; else `None`.

    That is from the best value to the fence of Tukey on the other side, 1.5 times the distance of the quartiles away.
    """
    ordered = sorted(point.value for point in curve.points if has_height(point.value))
    if len(ordered) < _FEWEST:
        return None
    lowest, low, high, highest = ordered[0], *(ordered[len(ordered) * part // 4] for part in (1, 3)), ordered[-1]
    reach = 1.5 * (high - low)
    found = (max(lowest, low - reach), highest) if curve.higher_is_better else (lowest, min(highest, high + reach))
    return found if 0 < found[1] - found[0] < _LARGEST_SHARE * (highest - lowest) else None


def kept_by_tolerances(keeper: KeeperHistory, tolerances: Sequence[int]) -> list[KeptByTolerance]:
    """Return what each of `tolerances` keeps in the present timeline, whether the run had it or not."""
    policy = replace(keeper.policy, tolerances=tuple(tolerances))
    present = keeper.present
    state: BestState = present.base
    found: dict[int, KeptByTolerance] = {}
    for entry, state, decision in present.walk(policy, until=present.last_iteration):
        for tolerance in decision.newly_exceeded:
            found[tolerance] = KeptByTolerance(tolerance, state.exceeded[tolerance], entry.observation.iteration)
    return [
        found.get(each) or KeptByTolerance(each, state.exceeded.get(each, state.best), None)
        for each in policy.tolerances
    ]


def _points(keeper: KeeperHistory, timeline: Timeline) -> list[Point]:
    return [
        Point(entry.observation.iteration, entry.observation.value, decision.is_new_best)
        for entry, _, decision in timeline.walk(keeper.policy, until=timeline.last_iteration)
    ]


def _shared(mine: Sequence[TimelineEntry], others: Sequence[TimelineEntry]) -> int:
    """Count the entries at the beginning of two timelines that are the same."""
    pairs = zip(mine, others, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one is not other), min(len(mine), len(others)))

"""The history of one metric in a ledger, prepared for pictures and tables. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from keepbest.decision import Best, BestState
from keepbest.errors import SnapshotError
from keepbest.iteration import TrainingIteration
from keepbest.run.history import Entry, History, KeeperHistory, Timeline

_UNITS = ("update", "epoch", "sample")


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
class Patience:
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
        unit: Unit of the axis of iterations: the finest one that all of them have.
        points: Points of the present timeline.
        abandoned: Points of other timelines that the next timeline does not share.
        restarts: Last iterations before each restart in the present timeline.
        patiences: Patiences of the keeper's own tolerances.
    """

    keeper: str
    metric_key: str
    unit: str
    points: list[Point]
    abandoned: list[list[Point]]
    restarts: list[TrainingIteration]
    patiences: list[Patience]

    def position(self, iteration: TrainingIteration) -> int:
        """Return the position of `iteration` on the axis."""
        place: int | None = getattr(iteration, self.unit)
        return 0 if place is None else place


def curves(history: History) -> list[Curve]:
    """Return a curve for each keeper of the run that has observed something, in the order in which they began.

    Raises:
        SnapshotError: If there is none.
    """
    found = [curve(name, keeper) for name, keeper in history.keepers.items() if keeper.present.entries]
    if not found:
        raise SnapshotError("nothing was observed in this run yet")
    return found


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
    return Curve(
        keeper=name,
        metric_key=keeper.metric_key,
        unit=unit,
        points=_points(keeper, present),
        abandoned=abandoned,
        restarts=restarts,
        patiences=patiences(keeper, keeper.policy.tolerances),
    )


def patiences(keeper: KeeperHistory, tolerances: Sequence[int]) -> list[Patience]:
    """Return what each of `tolerances` keeps in the present timeline, whether the run had it or not."""
    policy = replace(keeper.policy, tolerances=tuple(tolerances))
    present = keeper.present
    state: BestState = present.base
    found: dict[int, Patience] = {}
    for entry, state, decision in present.walk(policy, until=present.last_iteration):
        for tolerance in decision.newly_exceeded:
            found[tolerance] = Patience(tolerance, state.exceeded[tolerance], entry.observation.iteration)
    return [found.get(each) or Patience(each, state.exceeded.get(each, state.best), None) for each in policy.tolerances]


def _points(keeper: KeeperHistory, timeline: Timeline) -> list[Point]:
    return [
        Point(entry.observation.iteration, entry.observation.value, decision.is_new_best)
        for entry, _, decision in timeline.walk(keeper.policy, until=timeline.last_iteration)
    ]


def _shared(mine: Sequence[Entry], others: Sequence[Entry]) -> int:
    """Count the entries at the beginning of two timelines that are the same."""
    pairs = zip(mine, others, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one is not other), min(len(mine), len(others)))

"""What a ledger tells of one metric, ready to be drawn or tabled. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from keepbest.decision import Best, BestState, decide
from keepbest.errors import SnapshotError
from keepbest.iteration import TrainingIteration
from keepbest.run.history import Entry, History, KeeperHistory, Timeline

_UNITS = ("update", "epoch", "sample")


@dataclass(frozen=True, slots=True)
class Point:
    """One observation.

    Attributes:
        iteration: when.
        value: may be NaN or infinite.
        is_new_best: whether it was, in its timeline.
    """

    iteration: TrainingIteration
    value: float
    is_new_best: bool


@dataclass(frozen=True, slots=True)
class Patience:
    """What early stopping with some tolerance keeps.

    Attributes:
        tolerance: intervals without improvement that are put up with.
        kept: the best when it was exceeded, or now if it is not; `None` if there is none.
        exceeded_at: when it was exceeded; `None` if it is not.
    """

    tolerance: int
    kept: Best | None
    exceeded_at: TrainingIteration | None


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric of a run.

    Attributes:
        keeper: name of the keeper.
        metric_key: that it monitors.
        unit: of the axis that iterations are drawn on: the finest that they all have.
        points: of the present timeline.
        abandoned: what other timelines have beyond what they share with the next.
        restarts: the last iterations before the run was taken up again, of the present timeline.
        patiences: of the keeper's own tolerances.
    """

    keeper: str
    metric_key: str
    unit: str
    points: list[Point]
    abandoned: list[list[Point]]
    restarts: list[TrainingIteration]
    patiences: list[Patience]

    def position(self, iteration: TrainingIteration) -> int:
        """Of `iteration` on the axis."""
        place: int | None = getattr(iteration, self.unit)
        return 0 if place is None else place


def curves(history: History) -> list[Curve]:
    """One for each keeper of the run that has observed something, in the order in which they began.

    Raises:
        SnapshotError: if there is none.
    """
    found = [curve(name, keeper) for name, keeper in history.keepers.items() if keeper.present.entries]
    if not found:
        raise SnapshotError("nothing was observed in this run yet")
    return found


def curve(name: str, keeper: KeeperHistory) -> Curve:
    """That of one keeper, which has observed something."""
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
    """What each of `tolerances`, whether the run had them or not, has kept in the present timeline."""
    policy = replace(keeper.policy, tolerances=tuple(tolerances))
    state: BestState = keeper.present.base
    found: dict[int, Patience] = {}
    for entry in keeper.present.entries:
        state, decision = decide(policy, state, entry.observation)
        for tolerance in decision.newly_exceeded:
            found[tolerance] = Patience(tolerance, state.exceeded[tolerance], entry.observation.iteration)
    return [found.get(each) or Patience(each, state.exceeded.get(each, state.best), None) for each in policy.tolerances]


def _points(keeper: KeeperHistory, timeline: Timeline) -> list[Point]:
    points: list[Point] = []
    state = timeline.base
    for entry in timeline.entries:
        state, decision = decide(keeper.policy, state, entry.observation)
        points.append(Point(entry.observation.iteration, entry.observation.value, decision.is_new_best))
    return points


def _shared(mine: Sequence[Entry], others: Sequence[Entry]) -> int:
    """How many entries at the beginning of two timelines are the same."""
    pairs = zip(mine, others, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one is not other), min(len(mine), len(others)))

"""What each keeper of a run has seen, in a few numbers. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from keepbest.run.history import History, KeeperHistory


@dataclass(frozen=True, slots=True)
class KeeperSummary:
    """What one keeper of a run has seen so far.

    Attributes:
        name: Name of the keeper, which is also that of the ref on its best.
        metric_key: Metric that it monitors.
        higher_is_better: Direction of the metric.
        best: Value of the best that is kept; `None` if there is none.
        observations: Number of observations of the present timeline.
        last_value: Value of the newest one, possibly NaN or infinite; `None` before the first.
        last_iteration: Training iteration of the newest one.
        intervals_since_best: Number of intervals since the last new best of the timeline.
        has_ended: Whether training was over for it. If not, it trains, or was interrupted.
    """

    name: str
    metric_key: str
    higher_is_better: bool
    best: float | None
    observations: int
    last_value: float | None
    last_iteration: str | None
    intervals_since_best: int
    has_ended: bool

    @property
    def better(self) -> str:
        """The direction, in a word."""
        return "higher" if self.higher_is_better else "lower"

    def describe(self) -> str:
        """Return one line on it: the direction, the best, and how far it is."""
        line = f"{self.metric_key}: {self.better} is better"
        if self.last_value is None:
            return f"{line}; nothing observed yet"
        best = "no best yet" if self.best is None else f"best {self.best:.9g}"
        since = f"intervals without a new best: {self.intervals_since_best}"
        last = f"observations: {self.observations}, the last {self.last_value:.9g} at {self.last_iteration}"
        return f"{line}; {best}; {since}; {last}{'; ended' if self.has_ended else ''}"


def keeper_summaries(history: History) -> dict[str, KeeperSummary]:
    """Return the summary of each keeper, by its name, in the order in which they began."""
    return {name: _summary(name, keeper) for name, keeper in history.keepers.items()}


def _summary(name: str, keeper: KeeperHistory) -> KeeperSummary:
    present = keeper.present
    last = present.entries[-1].observation if present.entries else None
    return KeeperSummary(
        name=name,
        metric_key=keeper.metric_key,
        higher_is_better=keeper.policy.higher_is_better,
        best=keeper.kept_best,
        observations=len(present.entries),
        last_value=None if last is None else last.value,
        last_iteration=None if present.last_iteration is None else str(present.last_iteration),
        intervals_since_best=present.state(keeper.policy, until=present.last_iteration).tolerance_counter,
        has_ended=keeper.has_ended,
    )

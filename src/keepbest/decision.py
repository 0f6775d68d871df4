"""What to do with an observation: a pure function of the state and the observation, the same on every rank.

A state is the fold of `decide` over a timeline, so the observations are enough to rebuild it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from keepbest.errors import ConfigError, IterationError
from keepbest.iteration import TrainingIteration


@dataclass(frozen=True, slots=True)
class Policy:
    """When a metric counts as better, how long it may fail to improve, and how many bests are kept.

    Attributes:
        higher_is_better: Direction of the metric.
        min_delta: Threshold of improvement. A new best must beat the old one by more than this, in units of the metric.
        tolerances: Unique integers >= 0, in intervals, ascending.
        top_k: Number of best values of a timeline that are kept. 1 is the best alone.
        baseline: Value that the first best must beat as any other best must beat the one before; `None` for any.

    Raises:
        ConfigError: If `min_delta` is negative or not finite, a tolerance is negative, given twice or not an integer,
            `top_k` is not an integer >= 1, or `baseline` is not finite.
    """

    higher_is_better: bool
    min_delta: float = 0.0
    tolerances: tuple[int, ...] = ()
    top_k: int = 1
    baseline: float | None = None

    def __post_init__(self) -> None:
        if self.baseline is not None and not math.isfinite(self.baseline):
            raise ConfigError(f"baseline must be a finite number, got {self.baseline!r}")
        if not 0.0 <= self.min_delta < math.inf:
            raise ConfigError(f"min_delta must be a finite number >= 0, got {self.min_delta!r}")
        for tolerance in self.tolerances:
            if type(tolerance) is not int or tolerance < 0:
                raise ConfigError(f"tolerances must be integers >= 0, got {tolerance!r}")
        if len(set(self.tolerances)) != len(self.tolerances):
            raise ConfigError(f"tolerances must differ from each other, got {list(self.tolerances)}")
        object.__setattr__(self, "tolerances", tuple(sorted(self.tolerances)))
        if type(self.top_k) is not int or self.top_k < 1:
            raise ConfigError(f"keep_top_k must be an integer >= 1, got {self.top_k!r}")

    @property
    def worst(self) -> float:
        """The worst infinity."""
        return -math.inf if self.higher_is_better else math.inf

    def ranked(self, bests: Iterable[Best]) -> tuple[Best, ...]:
        """Return the `top_k` best of `bests`, the best first; empty if only the best is kept."""
        top: list[Best] = []
        for best in bests:
            if (place := self.entering(best.value, top)) is not None:
                top.insert(place, best)
        return tuple(top[: self.top_k])

    def entering(self, value: float, top: Sequence[Best]) -> int | None:
        """Return the place, from 0, of `value` among the best `top`; `None` if it is not among the `top_k` best.

        Of equal values the older one ranks higher. `min_delta` does not count.
        """
        if self.top_k == 1 or not self.is_better(value, self.baseline, min_delta=0.0):
            return None
        place = next((i for i, best in enumerate(top) if self.is_better(value, best.value, min_delta=0.0)), len(top))
        return place if place < self.top_k else None

    def is_better(self, value: float, best: float | None, *, min_delta: float | None = None) -> bool:
        """Whether `value` beats `best` strictly, by more than `min_delta` (by default the policy's).

        NaN and infinities are never better. `None` stands for the baseline. Any finite value beats none.
        """
        if not math.isfinite(value):
            return False
        if (best := self.baseline if best is None else best) is None:
            return True
        gain = value - best if self.higher_is_better else best - value
        return gain > (self.min_delta if min_delta is None else min_delta)


@dataclass(frozen=True, slots=True)
class Observation:
    """One agreed value of the monitored metric.

    Attributes:
        iteration: Iteration at which it was observed.
        value: Value of the metric, possibly NaN or infinite.
        durable: False if it was a new best whose weights could not be saved. It then counts as not improving.
    """

    iteration: TrainingIteration
    value: float
    durable: bool = True


@dataclass(frozen=True, slots=True)
class Best:
    """A value that was the best.

    Attributes:
        value: Value of the metric.
        iteration: Iteration whose weights reached it.
    """

    value: float
    iteration: TrainingIteration

    def __str__(self) -> str:
        return f"{self.value!r} at {self.iteration}"


@dataclass(frozen=True, slots=True)
class BestState:
    """Everything that decisions remember between intervals.

    Attributes:
        best: Best of the timeline; `None` before the first finite value that beats the baseline.
        tolerance_counter: Number of intervals since the last improvement.
        exceeded: For each tolerance that was exceeded, the best at that moment; `None` if there was none yet.
        last_iteration: Iteration of the newest observation; `None` before the first.
        top: Best values that are kept, the best first; empty if only the best is kept.
    """

    best: Best | None = None
    tolerance_counter: int = 0
    exceeded: Mapping[int, Best | None] = field(default_factory=dict)
    last_iteration: TrainingIteration | None = None
    top: tuple[Best, ...] = ()

    def __str__(self) -> str:
        """One line of a length that does not depend on the number of tolerances."""
        closed = len(self.exceeded)
        return f"best {self.best}, {self.tolerance_counter} intervals ago, {closed} closed, at {self.last_iteration}"

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON values. `from_json` is the inverse."""
        return {
            "best": _best_to_json(self.best),
            "tolerance_counter": self.tolerance_counter,
            "exceeded": {str(tolerance): _best_to_json(best) for tolerance, best in sorted(self.exceeded.items())},
            "last_iteration": None if self.last_iteration is None else str(self.last_iteration),
            "top": [_best_to_json(best) for best in self.top],
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> BestState:
        """Return the state that `to_json` made into JSON values."""
        last = state["last_iteration"]
        return cls(
            best=_best_from_json(state["best"]),
            tolerance_counter=state["tolerance_counter"],
            exceeded={int(tolerance): _best_from_json(best) for tolerance, best in state["exceeded"].items()},
            last_iteration=None if last is None else TrainingIteration.parse(last),
            top=tuple(Best(best["value"], TrainingIteration.parse(best["iteration"])) for best in state.get("top", ())),
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """What follows from one observation.

    Attributes:
        is_new_best: Whether the value is the new best of the timeline.
        newly_exceeded: Tolerances that this observation closes, ascending.
        enters_top: Whether the value is among the `top_k` best.
    """

    is_new_best: bool
    newly_exceeded: tuple[int, ...] = ()
    enters_top: bool = False

    @property
    def is_saved(self) -> bool:
        """Whether the weights of this iteration must be saved."""
        return self.is_new_best or self.enters_top


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of an observation, the same on every rank.

    Attributes:
        iteration: Iteration that was observed.
        value: Value of the metric on which all ranks agreed.
        is_new_best: Whether it is the new best of the timeline. Its weights are durable then.
        newly_exceeded: Tolerances that it closed, ascending.
        enters_top: Whether it is among the `keep_top_k` best. Its weights are durable then too.
        save_failed: Whether a new best was lost because it could not be written (only with `on_save_error="warn"`).
    """

    iteration: TrainingIteration
    value: float
    is_new_best: bool
    newly_exceeded: tuple[int, ...] = ()
    enters_top: bool = False
    save_failed: bool = False


def outcome_again(observation: Observation, before: BestState, after: BestState, recorded: float | None) -> Outcome:
    """Return the outcome of an observation that was recorded already, by a call that was interrupted.

    Args:
        observation: What is observed again.
        before: State before it was recorded.
        after: State after that.
        recorded: Value that was recorded.

    Raises:
        IterationError: If it had another value.
    """
    iteration, value = observation.iteration, observation.value
    if repr(recorded) != repr(value):
        raise IterationError(
            f"iteration {iteration} was recorded with the value {recorded!r} by a call that was interrupted, and now "
            f"has the value {value!r}: continue with the next iteration"
        )
    return Outcome(
        iteration,
        value,
        is_new_best=after.best is not None and after.best.iteration == iteration,
        newly_exceeded=tuple(sorted(after.exceeded.keys() - before.exceeded.keys())),
        enters_top=any(best.iteration == iteration for best in after.top),
    )


def decide(policy: Policy, state: BestState, observation: Observation) -> tuple[BestState, Decision]:
    """Return the state after `observation`, and what to do about it.

    A tolerance is exceeded when the number of intervals without improvement first becomes greater than it. It is then
    closed for good.

    Raises:
        IterationError: If the observation does not come strictly after the last one, or names other parts.
    """
    if state.last_iteration is not None and not observation.iteration.follows(state.last_iteration):
        raise IterationError(
            f"iteration {observation.iteration} does not come after {state.last_iteration}, the last one observed; "
            "iterations must increase (to go back to an earlier one, resume from its state)"
        )
    top, place = state.top, None
    if policy.top_k > 1 and observation.durable:
        place = policy.entering(observation.value, top)
    if place is not None:
        entered = Best(observation.value, observation.iteration)
        top = (*top[:place], entered, *top[place:])[: policy.top_k]
    best_value = None if state.best is None else state.best.value
    if observation.durable and policy.is_better(observation.value, best_value):
        best = Best(observation.value, observation.iteration)
        after = replace(state, best=best, tolerance_counter=0, last_iteration=observation.iteration, top=top)
        return after, Decision(True, enters_top=place is not None)
    counter = state.tolerance_counter + 1
    newly_exceeded = tuple([each for each in policy.tolerances if counter > each and each not in state.exceeded])
    after = BestState(
        best=state.best,
        tolerance_counter=counter,
        exceeded={**state.exceeded, **dict.fromkeys(newly_exceeded, state.best)} if newly_exceeded else state.exceeded,
        last_iteration=observation.iteration,
        top=top,
    )
    return after, Decision(False, newly_exceeded, place is not None)


def fold(policy: Policy, observations: Iterable[Observation], *, start: BestState | None = None) -> BestState:
    """Return the state after all of `observations`, from `start` or the beginning of a timeline."""
    state = BestState() if start is None else start
    for observation in observations:
        state, _ = decide(policy, state, observation)
    return state


def _best_to_json(best: Best | None) -> dict[str, Any] | None:
    return None if best is None else {"value": best.value, "iteration": str(best.iteration)}


def _best_from_json(best: Mapping[str, Any] | None) -> Best | None:
    return None if best is None else Best(best["value"], TrainingIteration.parse(best["iteration"]))

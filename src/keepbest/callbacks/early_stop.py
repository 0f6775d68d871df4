"""`MetricEarlyStopper`: ends training when a metric has stopped improving."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from keepbest.callbacks.config import CallBackBaseConfig
from keepbest.callbacks.periodic import PeriodicCallback
from keepbest.decision import BestState, Observation, Policy, decide
from keepbest.interval import IntervalType
from keepbest.metric import LOG_REMEDY, agree_on_metric, read_scalar
from keepbest.reduction import MetricReduction
from keepbest.settings import Direction

if TYPE_CHECKING:
    from keepbest.training.counter import UpdateCounter


class MetricEarlyStopperConfig(CallBackBaseConfig):
    """Config of `MetricEarlyStopper`.

    Attributes:
        metric_key: Key of the metric in the log.
        tolerance: Number of intervals in a row without improvement that do not end training. The next one does.
        higher_is_better: Direction of the metric; `None` derives it from the metric's name.
        min_delta: Threshold of improvement. A new best must beat the old one by more than this, in units of the metric.
        metric_reduction: Way in which the values of the ranks become one.
    """

    name: Literal["MetricEarlyStopper"] = "MetricEarlyStopper"
    metric_key: str
    tolerance: Annotated[int, Field(ge=0, strict=True)]
    higher_is_better: Direction = None
    min_delta: Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)] = 0.0
    metric_reduction: MetricReduction = "mean"


class MetricEarlyStopper(PeriodicCallback):
    """Ends training after more than `tolerance` intervals in a row without a new best of the metric.

    It stops at the interval at which `BestCheckpointCallback` exceeds the same tolerance. If a run that was stopped
    resumes, it stops again at its first interval, unless the tolerance was changed.

    Attributes:
        metric_key: Key of the metric in the log.
        tolerance: Number of intervals in a row without improvement that do not end training.

    Raises:
        ConfigError: If the direction is neither given nor known from the metric's name.
    """

    config_class: ClassVar[type[MetricEarlyStopperConfig]] = MetricEarlyStopperConfig

    def __init__(self, callback_config: MetricEarlyStopperConfig, **kwargs: Any) -> None:
        super().__init__(callback_config, **kwargs)
        self.metric_key = callback_config.metric_key
        self.tolerance = callback_config.tolerance
        self._reduction: MetricReduction = callback_config.metric_reduction
        higher = callback_config.higher_is_better
        if higher is None:
            higher = self.metric_property_provider.higher_is_better(self.metric_key)
        self._policy = Policy(higher, min_delta=callback_config.min_delta, tolerances=(self.tolerance,))
        self._state = BestState()

    @property
    def state_key_details(self) -> list[str]:
        return [self.metric_key, f"tolerance={self.tolerance}"]

    def state_dict(self) -> dict[str, Any]:
        return self._state.to_json()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = BestState.from_json(state_dict)

    def periodic_callback(self, *, interval_type: IntervalType, update_counter: UpdateCounter, **_kwargs: Any) -> None:
        """Observe the metric that was logged at this iteration. **Collective**: one exchange. Nothing in evaluation.

        Raises:
            MetricError: On every rank, if a rank did not log the metric or its value cannot be used.
            IterationError: If the iteration does not come after the last one.
        """
        if interval_type == "eval":
            return
        iteration = update_counter.iteration
        value, _ = agree_on_metric(
            self.ranks,
            self.metric_key,
            lambda: read_scalar(self.log_writer.log_cache, self.metric_key, iteration),
            self._reduction,
            state=f"{self.state_key} {iteration} {json.dumps(self._state.to_json())}".encode(),
            remedy=LOG_REMEDY,
        )
        self._state, _ = decide(self._policy, self._state, Observation(iteration, value))
        if self.tolerance in self._state.exceeded:
            best = self._state.exceeded[self.tolerance]
            reached = "" if best is None else f"; the best was {best.value:g} at {best.iteration}"
            self.trainer.stop(
                f"{self.metric_key} did not improve for {self._state.tolerance_counter} intervals, "
                f"more than tolerance={self.tolerance}{reached}"
            )

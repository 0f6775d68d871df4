"""`BestCheckpointCallback`: keeps the best model of a run, and evaluates each new best."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from keepbest.callbacks.assemble import assemble_callbacks
from keepbest.callbacks.base import CallbackBase
from keepbest.callbacks.component import Component
from keepbest.callbacks.config import CallBackBaseConfig, Discriminated
from keepbest.callbacks.data_iterator import PeriodicDataIteratorCallback
from keepbest.callbacks.periodic import PeriodicCallback
from keepbest.callbacks.training_state import trainer_state
from keepbest.decision import Outcome
from keepbest.errors import ConfigError
from keepbest.face import Face
from keepbest.interval import IntervalType
from keepbest.keeper import BestKeeper
from keepbest.metric import LOG_REMEDY, read_scalar
from keepbest.ranks import NO_REMEDY
from keepbest.run.layout import ledger_exists
from keepbest.run.takeover import Existing
from keepbest.settings import CommonSettings

if TYPE_CHECKING:
    from keepbest.training.counter import UpdateCounter

_logger = logging.getLogger(__name__)


class BestCheckpointCallbackConfig(CommonSettings, CallBackBaseConfig):
    """Config of `BestCheckpointCallback`. The interval is that of the callback that logs the metric.

    It has the settings of `CommonSettings` too, which docs/settings.md describes: all but `resume` and `existing`,
    since the trainer says when a run is resumed.

    Attributes:
        metric_key: Key of the monitored metric in the log.
        eval_callbacks: Callbacks that run on each new best, by their `at_eval`. Their own schedule is ignored, and
            their keys start with `best=<metric key, with dots for slashes>/`, and then `id=<id>/` with an `id`.
        save_training_state: Whether optimizers, the place in the data and random states are kept with each best, so
            that `trainer.resume=best` continues from it.
        on_new_best: Functions that rank 0 calls with the outcome and the path of each new best when it is on the disk,
            each as the `kind` that makes it and its arguments. With `kind: keepbest.EveryRank` and the function as
            `hook`, every rank calls it.
    """

    name: Literal["BestCheckpointCallback"] = "BestCheckpointCallback"
    metric_key: str
    eval_callbacks: Annotated[list[Annotated[Any, Discriminated(CallBackBaseConfig)]] | None, Field(strict=False)] = (
        None
    )
    save_training_state: Annotated[bool, Field(strict=True)] = False
    on_new_best: Annotated[tuple[Component, ...], Field(strict=False)] = ()


class _Keeper(BestKeeper):
    _face = Face(
        Existing(resume="trainer.resume=auto", set_aside="trainer.existing=set_aside"),
        missing=LOG_REMEDY,
        unobserved="the callback needs an interval that comes before the end of training",
    )


class BestCheckpointCallback(PeriodicCallback):
    """Saves the model whenever the monitored metric reaches a new best. A thin shell around `BestKeeper`.

    The constructor is **collective**.

    Attributes:
        keeper: Keeper that decides, saves and remembers.
        metric_key: Key of the monitored metric.
        model_names: Submodels to save; `None` saves all of them.
        save_frozen_weights: Whether parameters that do not require grad are saved.
        keeps_training_state: Whether training can continue from the best.
        higher_is_better: Direction of the metric.
        eval_callbacks: Callbacks that run on each new best.

    Raises:
        ConfigError: On every rank, if a setting is invalid.
    """

    config_class: ClassVar[type[BestCheckpointCallbackConfig]] = BestCheckpointCallbackConfig

    def __init__(self, callback_config: BestCheckpointCallbackConfig, **kwargs: Any) -> None:
        super().__init__(callback_config, **kwargs)
        config = callback_config
        self.metric_key = config.metric_key
        self.model_names = config.model_names
        self.save_frozen_weights = config.save_frozen_weights
        self.keeps_training_state = config.save_training_state
        if config.save_training_state:
            self._refuse_what_cannot_continue()
        self.keeper: BestKeeper = _Keeper(
            self.model,
            directory=self.directory,
            metric_key=config.metric_key,
            metric_property_provider=self.metric_property_provider,
            process_group=self.ranks.process_group,
            training_state=trainer_state(self.trainer, self.ranks) if config.save_training_state else None,
            on_new_best=self.ranks.agree("build on_new_best", lambda: [_build(hook) for hook in config.on_new_best]),
            **config.keeper_arguments(),
        )
        self.higher_is_better = self.keeper.policy.higher_is_better
        prefix = f"best={self.metric_key.replace('/', '.')}"
        prefix += "/" if config.id is None else f"/id={config.id}/"
        context = {**kwargs, "log_writer": self.log_writer.prefixed(prefix)}
        self.eval_callbacks = assemble_callbacks(config.eval_callbacks or [], **context)
        self._is_resumed = False
        self._logged_name = self.metric_key if config.id is None else f"{self.metric_key}/id={config.id}"

    def _refuse_what_cannot_continue(self) -> None:
        if self.trainer.average is not None:
            raise ConfigError(
                "save_training_state: the best has the average of the weights, which training does not continue from; "
                "remove trainer.ema_decay, or save_training_state"
            )
        if self.model_names is not None:
            raise ConfigError("save_training_state: training needs all submodels; remove model_names")

    @property
    def state_key_details(self) -> list[str]:
        return [self.metric_key, *super().state_key_details]

    @property
    def best_metric_value(self) -> float:
        """The best value so far; the worse infinity before there is one. **Rank-local**."""
        return self.keeper.best_metric_value

    @property
    def tolerance_counter(self) -> int:
        """Intervals since the last improvement. **Rank-local**."""
        return self.keeper.state.tolerance_counter

    @property
    def tolerances_is_exceeded(self) -> dict[int, bool]:
        """For each tolerance, whether it was exceeded and its checkpoint is final. **Rank-local**."""
        return {tolerance: tolerance in self.keeper.state.exceeded for tolerance in self.keeper.policy.tolerances}

    @property
    def metric_at_exceeded_tolerance(self) -> dict[int, float]:
        """For each exceeded tolerance, the best value at that moment; NaN if there was none. **Rank-local**."""
        exceeded = self.keeper.state.exceeded.items()
        return {tolerance: math.nan if best is None else best.value for tolerance, best in exceeded}

    def get_children(self) -> list[CallbackBase]:
        """The children that evaluate no dataset. Those that do use data loaders of their own here."""
        return [child for child in self.eval_callbacks if not isinstance(child, PeriodicDataIteratorCallback)]

    def state_dict(self) -> dict[str, Any]:
        children = {child.state_key: child.state_dict() for child in self.eval_callbacks}
        return {"keeper": self.keeper.state_dict(), "children": children}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.keeper.load_state_dict(state_dict["keeper"])
        for child in self.eval_callbacks:
            if child.state_key in state_dict["children"]:
                child.load_state_dict(state_dict["children"][child.state_key])
        self._is_resumed = True

    def before_training(self, *, update_counter: UpdateCounter, **kwargs: Any) -> None:
        """Start the keeper in the run's directory. **Collective**.

        Raises:
            ConfigError: On every rank, if training ends before the first interval.
            NotImplementedError: On every rank, if training resumes from a later iteration with tolerances, but neither
                the state of this callback nor a ledger shows what happened before.
            KeepBestError: What `BestKeeper.start` raises.
        """
        self._refuse_if_never_due(update_counter)
        is_under_way = update_counter.update > 0
        if is_under_way and not self._is_resumed and self.keeper.policy.tolerances and not self._ledger_exists():
            raise NotImplementedError(
                f"cannot resume at {update_counter.iteration} with tolerances: there is neither a saved state of this "
                f"callback nor a ledger in {self.directory} that shows for how long {self.metric_key} did not improve. "
                "Resume from a checkpoint of CheckpointCallback, or remove the tolerances"
            )
        # A run that restarts before its first resume checkpoint starts over, in the directory that it has.
        may_resume = is_under_way or self.trainer.resume is not None
        self.keeper.start(at=update_counter.iteration if may_resume else None)
        for child in self.eval_callbacks:
            child.before_training(update_counter=update_counter, **kwargs)

    def _refuse_if_never_due(self, counter: UpdateCounter) -> None:
        if not self.interval.is_due_by(
            counter.end_update,
            updates_per_epoch=counter.updates_per_epoch,
            effective_batch_size=counter.effective_batch_size,
        ):
            raise ConfigError(
                f"training ends after {counter.end_update} updates, of which {counter.updates_per_epoch} are an epoch, "
                f"before the BestCheckpointCallback of {self.metric_key} is first called, with {self.interval}, so no "
                "best could be kept: train for longer, or choose a shorter interval"
            )

    def _ledger_exists(self) -> bool:
        look = partial(ledger_exists, self.directory)
        return bool(self.ranks.broadcast("look for a ledger", look, remedy=NO_REMEDY, saving=True))

    def periodic_callback(
        self,
        *,
        interval_type: IntervalType,
        update_counter: UpdateCounter,
        batch_size: int,
        data_iter: Iterator[Any] | None = None,  # noqa: ARG002  # children have data loaders of their own
        **kwargs: Any,
    ) -> None:
        """Observe the metric, save a new best, and evaluate it. **Collective**.

        It logs `best/<metric key>` at each new best, and `best/<metric key>/tolerance=<N>` when that tolerance is
        exceeded. With an `id` the keys start with `best/<metric key>/id=<id>`.

        With `interval_type="eval"` the children run on the model as it is. Nothing is saved or counted.

        Raises:
            MissingMetricError: On every rank, if a rank did not log the metric at this iteration. It is a `KeyError`.
            KeepBestError: What `BestKeeper.observe` raises.
        """
        if interval_type != "eval":
            iteration = update_counter.iteration
            closed = set(self.keeper.state.exceeded)
            outcome = self.keeper.observe_reading(
                lambda: read_scalar(self.log_writer.log_cache, self.metric_key, iteration), iteration
            )
            self._log_marks(outcome, closed)
            if not outcome.is_new_best:
                return
        for child in self.eval_callbacks:
            child.at_eval(update_counter=update_counter, batch_size=batch_size, **kwargs)

    def _log_marks(self, outcome: Outcome, closed: AbstractSet[int]) -> None:
        """Log a new best, and what the tolerances have kept that were not `closed` before."""
        mark = f"best/{self._logged_name}"
        if outcome.is_new_best:
            self.log_writer.add_scalar(mark, outcome.value)
        for tolerance, best in self.keeper.state.exceeded.items():
            if tolerance not in closed and best is not None:
                self.log_writer.add_scalar(f"{mark}/tolerance={tolerance}", best.value)

    def after_training(self, **kwargs: Any) -> None:
        """Close the keeper, and log the best value and those that the tolerances kept. **Collective**.

        Raises:
            KeepBestError: What `BestKeeper.close` raises.
        """
        self.keeper.close()
        key = f"best_model/{self._logged_name}"
        if self.keeper.state.best is not None:
            self.log_writer.add_scalar(key, self.best_metric_value)
        for tolerance in self.tolerances_is_exceeded:
            if math.isfinite(value := self._value_at(tolerance)):
                self.log_writer.add_scalar(f"{key}/tolerance={tolerance}", value)
        # The others may wait for rank 0 after this.
        self.ranks.agree(f"log the tolerances of {key}", self._log_tolerances)
        for child in self.eval_callbacks:
            child.after_training(**kwargs)

    def _value_at(self, tolerance: int) -> float:
        is_exceeded = self.tolerances_is_exceeded[tolerance]
        return self.metric_at_exceeded_tolerance[tolerance] if is_exceeded else self.best_metric_value

    def _log_tolerances(self) -> None:
        for tolerance, is_exceeded in self.tolerances_is_exceeded.items() if self.ranks.is_main else ():
            note = "" if is_exceeded else " (not exceeded)"
            _logger.info("%s with tolerance=%d: %r%s", self.metric_key, tolerance, self._value_at(tolerance), note)

    def before_preemption(self, **kwargs: Any) -> None:
        """Make everything durable that was observed. **Collective**."""
        self.keeper.flush()
        for child in self.eval_callbacks:
            child.before_preemption(**kwargs)

    def after_exception(self, **kwargs: Any) -> None:
        """Pass it on to the children."""
        for child in self.eval_callbacks:
            child.after_exception(**kwargs)

    def before_checkpoint(self, **kwargs: Any) -> None:
        """Make durable what the present state names, which the checkpoint keeps from then on. **Collective**."""
        self.keeper.flush()
        for child in self.eval_callbacks:
            child.before_checkpoint(**kwargs)


def _build(hook: Component) -> Any:
    built = hook.build()
    if not callable(built):
        raise ConfigError(
            f"on_new_best: {hook.kind} was called, and gave {built!r}; kind names what makes a function of an outcome "
            "and a path, such as a class with __call__"
        )
    return built

"""`BestCheckpoint`: a handler of PyTorch-Ignite that keeps the best of a run with a `BestKeeper`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import ignite.distributed as idist
from ignite.engine import Engine, Events
from torch import nn
from typing_extensions import Unpack

from keepbest.errors import ConfigError, IterationError
from keepbest.face import Face
from keepbest.iteration import TrainingIteration
from keepbest.keeper import BestKeeper
from keepbest.metric import DEFAULT_REMEDY, Reading, read_reported
from keepbest.metric_properties import MetricPropertyProvider
from keepbest.misspelling import nearest
from keepbest.new_best import Hook
from keepbest.remote.storage import local_path
from keepbest.run.takeover import Existing
from keepbest.settings import KeeperSettings, check_metric_key
from keepbest.settings_dict import KeeperSettingsDict

_logger = logging.getLogger(__name__)

# What the newest checkpoint of Ignite names is kept under one tag: no event says which of them are removed.
_PIN = "ignite"

# What the metrics of an evaluator are that was terminated.
_OF_OTHER_WEIGHTS = ", and has the value of other weights"
_OF_A_PART = " of all data, and has the value of a part of it"


class _Keeper(BestKeeper):
    _face = Face(
        Existing(
            resume="Checkpoint.load_objects with this handler in to_load, or resume='ledger' of BestCheckpoint",
            set_aside="existing='set_aside' of BestCheckpoint",
        ),
        missing=f"Name what the evaluator computes in each of its runs. {DEFAULT_REMEDY}",
        unobserved="run the evaluator that was attached, while the trainer runs, on the data that attach() was given",
    )


class BestCheckpoint:
    """Observes a metric of an evaluator after each of its runs while the trainer runs.

    It belongs into the `to_save` of the `Checkpoint` that training is resumed from, and into what `load_objects` loads.

    Ignite's metrics are reduced already, so they are the same on all ranks, and `metric_reduction="mean"` keeps exactly
    this value. `"identical"` refuses values that were not reduced. `"sum"` would add the value up again.

    Args:
        model: Model to save, in the form that is trained: as `ignite.distributed.auto_model` or `fully_shard` gave it.
        metric_key: Name of the metric in `evaluator.state.metrics`, or of the score.
        directory: Directory of the run.
        score_function: Function of the evaluator that returns the score to observe in place of a metric, as
            Ignite's `Checkpoint` takes it: a higher one is better, unless `higher_is_better` says otherwise.
        metric_property_provider: As in `BestKeeper`.
        training_state: As in `BestKeeper`: optimizers, schedulers and the like.
        on_new_best: As in `BestKeeper`.
        **settings: The settings of `KeeperSettings`. They are described once, in the table of docs/settings.md.
            `resume="ledger"` resumes a folder that holds a run even if no state was loaded: at the iteration that
            training starts from, which may be the first.

    Attributes:
        keeper: Keeper of the present or last run of the trainer. `None` before the first.

    Raises:
        ConfigError: If a setting is unknown or wrong, the score function is no function, or lower values of what a
            score has the name of are better.
    """

    def __init__(
        self,
        model: nn.Module,
        metric_key: str,
        *,
        directory: str | Path,
        score_function: Callable[[Engine], Any] | None = None,
        metric_property_provider: MetricPropertyProvider | None = None,
        training_state: Mapping[str, Any] | None = None,
        on_new_best: Hook | Sequence[Hook] | None = None,
        **settings: Unpack[KeeperSettingsDict],
    ) -> None:
        checked = KeeperSettings.of(settings, taken_by=BestCheckpoint)
        check_metric_key(metric_key)
        self.metric_key = metric_key
        self.keeper: BestKeeper | None = None
        self._resume = checked.resume
        arguments = checked.keeper_arguments()
        if score_function is not None and not callable(score_function):
            raise ConfigError(f"score_function must be a function of the evaluator, found {score_function!r}")
        if score_function is not None and checked.higher_is_better is None:
            _refuse_if_lower_is_better(metric_key, metric_property_provider)
            arguments["higher_is_better"] = True
        self._make_keeper = partial(
            _Keeper,
            model,
            directory=local_path(directory, "directory"),
            metric_key=metric_key,
            metric_property_provider=metric_property_provider,
            training_state=training_state,
            on_new_best=on_new_best,
            **arguments,
        )
        self._score_function = score_function
        self._trainer: Engine | None = None
        self._data: Any = None
        self._passed_over: TrainingIteration | None = None
        self._has_warned = False
        self._observed_data: Any = None
        self._fault, self._is_cut_off = "", False  # of the present run of the evaluator
        self._loaded: dict[str, Any] = {}
        self._open: BestKeeper | None = None

    def attach(self, trainer: Engine, evaluator: Engine, *, data: Any = None) -> None:
        """Start and end with the runs of `trainer`, and observe those of `evaluator` in between. **Rank-local**.

        On every rank, before a `Checkpoint` is attached to `evaluator`, and before `trainer` runs or in a handler of
        its `Events.STARTED`. A trainer that runs already ends with a `ConfigError`, at its next iteration or its end.

        Args:
            trainer: Engine that trains the model.
            evaluator: Engine that evaluates it.
            data: What `evaluator.run` is given where a run is observed, for an evaluator that runs on other data too.
                `None` is any.

        Raises:
            ConfigError: If it is attached already.
        """
        if self._trainer is not None:
            raise ConfigError(f"the BestCheckpoint of {self.metric_key} is attached already; make one for each trainer")
        self._trainer, self._data = trainer, data
        trainer.add_event_handler(Events.STARTED, self._start)
        evaluator.add_event_handler(Events.STARTED, self._begin_evaluation)
        evaluator.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, self._cut_off)
        evaluator.add_event_handler(Events.EPOCH_COMPLETED, self._complete_epoch)
        evaluator.add_event_handler(Events.COMPLETED, self._observe, trainer)
        # Nothing public says whether an engine runs. What follows a start does not come to these.
        trainer.add_event_handler(Events.ITERATION_STARTED, self._refuse_without_start)
        if trainer.last_event_name != Events.COMPLETED:  # whose handlers may attach this for the next run
            trainer.add_event_handler(Events.COMPLETED, self._refuse_without_start)

    def state_dict(self) -> dict[str, Any]:
        """The state of the keeper; before there is one, what was loaded. **Collective** while the trainer runs.

        `Checkpoint` asks for it on every rank that it is called on, and only when it is about to write. So what the
        state names is made durable here, and is kept until the next checkpoint asks.

        While the trainer handles an exception this is rank-local, since other ranks may be elsewhere. The run is then
        left to be resumed, and nothing that the state names is removed any more.

        Raises:
            StorageError: On every rank, if something could not be written.
            RankTimeoutError: If the `Checkpoint` is not attached on all ranks.
        """
        if self._trainer is not None and self._trainer.last_event_name == Events.EXCEPTION_RAISED:
            self._let_go()
        if self._open is not None:
            self._open.flush(pin=_PIN)
        return self._state()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from this state when the trainer runs. **Rank-local**, on every rank, before that.

        Raises:
            ConfigError: If the trainer runs already, and this is another state than the present one.
        """
        if self._open is None:
            self._loaded = dict(state_dict)
        elif dict(state_dict) != self._open.state_dict():
            raise ConfigError(
                f"the trainer runs already, so {self._open.name} cannot go back to another state: load it before "
                "trainer.run(), or leave this handler out of what is loaded"
            )

    def _start(self, trainer: Engine) -> None:
        """Start the keeper. **Collective**. Raises as `BestKeeper` and its `start`."""
        self._let_go()
        for event in (Events.ITERATION_STARTED, Events.COMPLETED):
            if trainer.has_event_handler(self._refuse_without_start, event):
                trainer.remove_event_handler(self._refuse_without_start, event)
        # A trainer that runs on, for example for more epochs, continues from where this handler was.
        runs_on = self.keeper is not None and trainer.state.iteration > 0
        state, self._loaded = self._state() if self._loaded or runs_on else {}, {}
        self.keeper = self._make_keeper()
        if state:
            self.keeper.load_state_dict(state)
            self._refuse_if_started_over(self.keeper, trainer)
        self.keeper.start(at=_iteration_of(trainer) if self._resume == "ledger" else None)
        self._open, self._observed_data = self.keeper, None
        # Not earlier, so that what is attached to the same events before training is called before these.
        if not trainer.has_event_handler(self._complete, Events.COMPLETED):
            trainer.add_event_handler(Events.COMPLETED, self._complete)
            trainer.add_event_handler(Events.TERMINATE, self._terminate)
            trainer.add_event_handler(Events.EXCEPTION_RAISED, self._fail)
            # After the handlers of all others, since Ignite calls none after one that raises.
            if trainer.has_event_handler(_raise_again, Events.EXCEPTION_RAISED):
                trainer.remove_event_handler(_raise_again, Events.EXCEPTION_RAISED)
            trainer.add_event_handler(Events.EXCEPTION_RAISED, _raise_again)

    def _refuse_if_started_over(self, keeper: BestKeeper, trainer: Engine) -> None:
        last = keeper.state.last_iteration
        if last is None or (last.update or 0) <= trainer.state.iteration:
            return
        raise ConfigError(
            f"the state of {keeper.name} that was loaded has observed {last}, but the trainer starts at iteration "
            f"{trainer.state.iteration}: load the trainer with it, and run it for more epochs than it had. Ignite "
            "starts over where max_epochs is reached already"
        )

    def _refuse_without_start(self, trainer: Engine) -> None:
        raise ConfigError(
            f"the BestCheckpoint of {self.metric_key} was attached while the trainer ran, after its start, so it could "
            "observe nothing: attach it before trainer.run(), or in a handler of Events.STARTED"
        )

    def _observe(self, evaluator: Engine, trainer: Engine) -> None:
        """Observe the metric. **Collective**. Raises as `BestKeeper.observe`."""
        if self._open is None:
            return
        iteration = _iteration_of(trainer)
        if self._data is not None and evaluator.state.dataloader is not self._data:
            self._pass_over(self._open, iteration)
            return
        data = evaluator.state.dataloader
        is_again = self._open.state.last_iteration == iteration
        # Often the model is evaluated once more when training ends, as it was at the end of the last epoch, or begins
        # again, or where an evaluation each epoch coincides with one of every few iterations.
        is_same = self._observed_data is None or self._observed_data is data
        if is_again and (is_same or trainer.last_event_name == Events.COMPLETED):
            return
        self._observed_data = data
        self._open.observe_reading(lambda: self._read(evaluator, iteration if is_again else None), iteration)

    def _begin_evaluation(self) -> None:
        self._fault, self._is_cut_off = _OF_OTHER_WEIGHTS, False

    def _cut_off(self, evaluator: Engine, iter_counter: int = 0) -> None:
        """Note that `terminate_epoch` ends an epoch after so many batches, which may be all. **Rank-local**."""
        self._is_cut_off = evaluator.state.epoch_length is None or iter_counter < evaluator.state.epoch_length

    def _complete_epoch(self) -> None:
        self._fault, self._is_cut_off = _OF_A_PART if self._is_cut_off else "", False

    def _pass_over(self, keeper: BestKeeper, iteration: TrainingIteration) -> None:
        """Warn, once, if the evaluator has run at two iterations, and never on the data to observe. **Rank-local**."""
        before, self._passed_over = self._passed_over or iteration, iteration
        if before != iteration and keeper.state.last_iteration is None and not self._has_warned:
            self._has_warned = True
            if idist.get_rank() == 0:
                _logger.warning(
                    "%s: at %s and before, the evaluator ran on other data alone than attach() was given, so nothing "
                    "was observed: give data= the very object that evaluator.run is given",
                    keeper.name,
                    iteration,
                )

    def _read(self, evaluator: Engine, seen: TrainingIteration | None) -> Reading:
        if seen is not None:
            raise IterationError(
                f"at {seen} the evaluator of {self.metric_key} ran on other data before, and either might be meant: "
                "give attach() the data to observe, as data=..., or attach an evaluator that runs on it alone"
            )
        if self._score_function is not None:
            return read_reported(self._score_function(evaluator), self.metric_key)
        metrics: Mapping[str, Any] = evaluator.state.metrics
        if self.metric_key not in metrics:
            known = (", ".join(sorted(metrics)) or "none") + nearest(self.metric_key, metrics)
            return Reading(absent=f"{self.metric_key!r} is not among the metrics of the evaluator; there are: {known}")
        if self._fault:
            return Reading(
                absent=f"the evaluator was terminated before it computed {self.metric_key!r}{self._fault}. To evaluate "
                "fewer batches, give evaluator.run an epoch_length. What a score_function returns is observed as it is"
            )
        return read_reported(metrics[self.metric_key], self.metric_key)

    def _complete(self, trainer: Engine) -> None:
        """Close the keeper. **Collective**. Raises as `BestKeeper.close`."""
        keeper, self._open = self._open, None
        if keeper is not None:
            keeper.close()

    def _terminate(self, trainer: Engine) -> None:
        """Leave the run to be resumed if its end is skipped. **Rank-local**."""
        if trainer.should_terminate == "skip_completed":
            self._let_go()

    def _fail(self, trainer: Engine, error: BaseException) -> None:
        """Leave the run to be resumed. **Rank-local**."""
        self._let_go()

    def _state(self) -> dict[str, Any]:
        return self._loaded if self._loaded or self.keeper is None else self.keeper.state_dict()

    def _let_go(self) -> None:
        keeper, self._open = self._open, None
        if keeper is not None:
            keeper.abandon()


def _refuse_if_lower_is_better(name: str, provider: MetricPropertyProvider | None) -> None:
    try:
        is_higher = (provider or MetricPropertyProvider()).higher_is_better(name)
    except ConfigError:
        return
    if not is_higher:
        raise ConfigError(
            f"a higher score is better, as in Ignite, but of {name!r} a lower one is, by its name: give the score "
            "another name, such as 'score', or say higher_is_better"
        )


def _raise_again(trainer: Engine, error: BaseException) -> NoReturn:
    """Ignite takes an exception to be handled where it has a handler, unless one raises."""
    del trainer
    raise error


def _iteration_of(trainer: Engine) -> TrainingIteration:
    return TrainingIteration(epoch=trainer.state.epoch, update=trainer.state.iteration)

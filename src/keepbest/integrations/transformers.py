"""`BestCheckpoint`: a callback of Hugging Face's `Trainer` that keeps the best of a run with a `BestKeeper`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from typing_extensions import Unpack

from keepbest.errors import ConfigError, MissingMetricError
from keepbest.face import Face
from keepbest.integrations.transformers_arguments import direction, refuse_if_never_evaluated, reported_key
from keepbest.integrations.transformers_evaluations import Evaluations, is_only_evaluation, read_metric
from keepbest.iteration import TrainingIteration
from keepbest.keeper import BestKeeper
from keepbest.metric import DEFAULT_REMEDY, Reading
from keepbest.new_best import Hook, check_hooks
from keepbest.ranks import Ranks
from keepbest.remote.storage import local_path
from keepbest.run.takeover import Existing
from keepbest.settings import KeeperSettings, check_flag, check_metric_key
from keepbest.settings_dict import KeeperSettingsDict

_logger = logging.getLogger(__name__)

# What the newest checkpoint of the Trainer names is kept under one tag: no hook says which of them are removed.
_PIN = "transformers"
_RESUME = "resume='ledger' of BestCheckpoint"


class _Keeper(BestKeeper):
    _face = Face(
        Existing(
            resume=f"train(resume_from_checkpoint=True), or {_RESUME}",
            set_aside="existing='set_aside' of BestCheckpoint",
        ),
        missing=(
            "Name a metric that each evaluation reports to callbacks. What an evaluate() of your own adds to its "
            f"result they are not shown: add it in compute_metrics, or in evaluation_loop. {DEFAULT_REMEDY}"
        ),
        unobserved="the Trainer has not shown an evaluation to its callbacks",
    )

    def resumed_otherwise(self, resume: str) -> None:
        """Say how a run that is there would be resumed, where that is not as always. **Rank-local**."""
        self._face = self._face.resumed_by(resume)


class BestCheckpoint(TrainerCallback, ExportableState):
    """Observes a metric of each evaluation in `train`, except that of `eval_on_start`.

    Its state is in the checkpoints that the Trainer writes. `train(resume_from_checkpoint=...)` resumes it from there.

    What the Trainer reports is the same on all ranks already, and `metric_reduction="mean"` keeps exactly this value.
    `"identical"` refuses values that differ. `"sum"` would add the value up again.

    Args:
        metric_key: Name of the metric in what an evaluation reports. `eval_` is put before it where it is absent.
            `None` is the `metric_for_best_model` of the training arguments.
        directory: Directory of the run. `None` is the `output_dir` of the training arguments. Each trial of a
            `hyperparameter_search` has a folder for its run there. `hp_name` names it, as it names that of the
            Trainer's checkpoints. Without `hp_name`, the first trial has `run-0`, and the second one `run-1`.
        save_training_state: Whether the Trainer's optimizer and scheduler are kept with each best: as the training
            states `optimizer` and `scheduler`.
        on_new_best: As in `BestKeeper`. The Trainer cannot keep functions in its checkpoints, so it goes without
            `restore_callback_states_from_checkpoint`.
        **settings: The settings of `KeeperSettings`. They are described once, in the table of docs/settings.md. Without
            `higher_is_better` the direction is `greater_is_better` of the training arguments if the metric is their
            `metric_for_best_model`, or else what the name of the metric says. `resume="ledger"` resumes a folder that
            holds a run even if there is no checkpoint to resume from, or one without this callback: at the step that
            training starts from, which may be the first.

    Attributes:
        keeper: Keeper of the present or last `train` in this process. `None` before the first.

    Raises:
        ConfigError: If a setting is unknown or wrong.
    """

    def __init__(
        self,
        metric_key: str | None = None,
        *,
        directory: str | Path | None = None,
        save_training_state: bool = False,
        on_new_best: Hook | Sequence[Hook] | None = None,
        **settings: Unpack[KeeperSettingsDict],
    ) -> None:
        self.keeper: BestKeeper | None = None
        self._metric_key = metric_key
        self._given = None if directory is None else str(directory)
        self._directory = None if directory is None else local_path(directory, "directory")
        self._settings = KeeperSettings.of(settings, taken_by=BestCheckpoint)
        if metric_key is not None:
            check_metric_key(metric_key)
        check_flag("save_training_state", save_training_state)
        self._saves_training_state = save_training_state
        self._hooks = check_hooks(on_new_best)
        self._open: BestKeeper | None = None
        self._evaluations = Evaluations()
        self._has_warned = False
        self._trials = 0
        self._attempt: tuple[Any, int] = None, 0

    def state(self) -> dict[str, Any]:
        """The settings, from which the Trainer may make the callback anew, and the keeper's state. **Rank-local**."""
        return {
            "args": {
                "metric_key": self._metric_key if self._open is None else self._open.metric_key,
                "directory": self._given,  # where a run was moved to is known then, and not now
                "save_training_state": self._saves_training_state,
                # The Trainer writes them as JSON.
                **self._settings.model_dump(mode="json", exclude_defaults=True),
            },
            "attributes": {"resumed_state": None if self._open is None else self._open.state_dict()},
        }

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """**Rank-local**.

        Raises:
            ConfigError: If the Trainer would make this callback anew, without its `on_new_best`.
        """
        if self._hooks and args.restore_callback_states_from_checkpoint:
            raise ConfigError(
                "with restore_callback_states_from_checkpoint the Trainer makes its callbacks anew from a checkpoint, "
                "which cannot hold the functions of on_new_best: leave one of the two out"
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the keeper. **Collective**.

        By now the Trainer has wrapped the model and restored what is resumed from.

        Raises:
            ConfigError: On every rank, if the metric or its direction is not known, training ends before the first
                evaluation, or the training state of DeepSpeed is to be kept.
            KeepBestError: On every rank, as `BestKeeper` and its `start`.
        """
        starts_over = self._starts_over(args, state)
        self._leave()  # a training that ended by an exception calls no hook
        if args.deepspeed_plugin is not None and self._saves_training_state:
            raise ConfigError(
                "save_training_state: the optimizer of DeepSpeed has its state in a form of its own, which keepbest "
                "cannot gather; leave it out, and resume from the Trainer's checkpoints"
            )
        refuse_if_never_evaluated(args, state)
        key = reported_key(args, self._metric_key)
        settings = self._settings.keeper_arguments()
        if settings["higher_is_better"] is None:
            settings["higher_is_better"] = direction(args, key)
        directory = self._directory or local_path(str(args.output_dir), "output_dir")
        if state.is_hyper_param_search:
            # The number that the Trainer has is not shown to callbacks.
            self._trials += not starts_over
            trial = state.trial_name or f"run-{self._trials - 1}"
            directory /= trial
            # A search that starts again has other trials.
            settings |= {"resume": None, "remote": settings["remote"] and f"{settings['remote']}/{trial}"}
        keeper = _Keeper(
            kwargs["model"],
            directory=directory,
            metric_key=key,
            training_state=_training_state(**kwargs) if self._saves_training_state else None,
            on_new_best=self._hooks,
            **settings,
        )
        loaded = self._take_out(state, key)
        # At step 0 it is no checkpoint that this comes from, but what this callback gave when `train` was called.
        if loaded is not None and state.global_step > 0:
            keeper.load_state_dict(loaded)
        elif state.is_hyper_param_search:
            keeper.resumed_otherwise(
                "a trial is not resumed; with hp_name=lambda trial: f'run-{trial.number}' of hyperparameter_search, "
                "the trials of a study that continues have folders of their own"
            )
        elif state.global_step > 0:
            keeper.resumed_otherwise(f"{_RESUME}, since the checkpoint has no state of {keeper.name}")
        begun = TrainingIteration(update=state.global_step)
        keeper.start(at=begun if settings["resume"] == "ledger" or starts_over else None)
        self.keeper = self._open = keeper
        self._attempt = _attempt_of(state)
        self._evaluations, self._has_warned = Evaluations(), False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """From now on an evaluation observes something new. **Collective** where a checkpoint follows, as `flush`."""
        self._evaluations.step()
        self._evaluations.schedule(control.should_evaluate)
        self._prepare_checkpoint(control.should_save)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """**Collective** where a checkpoint follows, as `flush`."""
        self._evaluations.schedule(control.should_evaluate)
        self._prepare_checkpoint(control.should_save)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Observe the metric, if this is the first evaluation since the last step that reports it. **Collective**.

        In an evaluation before the first step, as of `eval_on_start`, it only has to be there.

        Raises:
            KeepBestError: On every rank, as `BestKeeper.observe`.
        """
        metrics: Mapping[str, Any] = kwargs["metrics"]
        if self._open is None:
            return
        if not self._evaluations.has_stepped and is_only_evaluation(metrics):
            is_needed = state.is_world_process_zero or self._settings.metric_reduction != "rank0"
            reading = read_metric(self._open.metric_key, metrics) if is_needed else Reading()
            Ranks.connect().agree("look for the metric before training", lambda: _refuse_if_absent(reading))
        if not self._evaluations.is_due:
            return
        if self._open.metric_key not in metrics and not is_only_evaluation(metrics):
            self._evaluations.add(metrics)
            return
        self._observe(metrics, state)
        # Whether there is a new best of the Trainer, which it saves then, it knows only after this.
        self._prepare_checkpoint(control.should_save or args.save_strategy == "best")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """**Rank-local**."""
        self._evaluations.log(kwargs.get("logs") or ())

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep what the checkpoint names until there is a newer one. **Collective**. Raises as `BestKeeper.flush`.

        No observation came between, so nothing of it was removed. Until here the last one was pinned.
        """
        if self._open is not None:
            self._open.flush(pin=_PIN)
            self._take_out(state, self._open.metric_key)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """**Collective** where the evaluations at the last step reported everything but the metric.

        Raises:
            MissingMetricError: On every rank.
        """
        self._refuse_what_was_not_reported(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the keeper: the last checkpoint is written by now. **Collective**.

        Raises:
            KeepBestError: On every rank, as `BestKeeper.close` and `on_step_begin`.
        """
        self._refuse_what_was_not_reported(state)
        keeper, self._open = self._open, None
        if keeper is not None:
            keeper.close()

    def _starts_over(self, args: TrainingArguments, state: TrainerState) -> bool:
        """Whether this is the same `train`, with fewer samples in a batch after the memory did not suffice."""
        (trial, samples), (trial_before, samples_before) = _attempt_of(state), self._attempt
        is_smaller = trial == trial_before and samples < samples_before
        return self._open is not None and args.auto_find_batch_size and is_smaller

    def _observe(self, metrics: Mapping[str, Any], state: TrainerState) -> None:
        self._evaluations.end()
        if self._open is not None:
            key = self._open.metric_key
            self._open.observe_reading(lambda: read_metric(key, metrics), TrainingIteration(update=state.global_step))

    def _refuse_what_was_not_reported(self, state: TrainerState) -> None:
        if names := self._evaluations.names_without_metric():
            self._observe(dict.fromkeys(names), state)
        elif (reason := self._evaluations.why_unseen()) and self._open and not self._has_warned:
            self._has_warned = True
            if state.is_world_process_zero:
                _logger.warning(
                    "%s: no callback was shown the evaluation at step %d: %s",
                    self._open.name,
                    state.global_step,
                    reason,
                )

    def _prepare_checkpoint(self, follows: bool) -> None:
        """What a checkpoint names must be on the disk before it; rank 0 asks for the state while it writes."""
        if follows and self._open is not None:
            self._open.flush()

    def _take_out(self, state: TrainerState, key: str) -> dict[str, Any] | None:
        """Remove the entries of this callback from the Trainer's state; the keeper's state in the newest of them.

        The Trainer appends another entry with each checkpoint where a class has several callbacks, and has no place
        for one that was not there when it wrote the checkpoint that it resumes from.
        """
        everything: Any = state.stateful_callbacks
        name = type(self).__name__
        entries = everything.get(name, [])
        entries = entries if isinstance(entries, list) else [entries]
        # Before training an entry has the name of the metric as it was given.
        ids = [(key, self._settings.id), (self._metric_key, self._settings.id)]
        mine = [entry for entry in entries if (entry["args"]["metric_key"], entry["args"].get("id")) in ids]
        everything[name] = [entry for entry in entries if entry not in mine]
        return mine[-1]["attributes"]["resumed_state"] if mine else None

    def _leave(self) -> None:
        if self._open is not None:
            self._open.abandon()
            self._open = None


def _refuse_if_absent(reading: Reading) -> None:
    if reading.absent:
        raise MissingMetricError(reading.absent)


def _training_state(*, optimizer: Any, lr_scheduler: Any, **_: Any) -> dict[str, Any]:
    """What a hook gets that is kept with each best."""
    return {"optimizer": optimizer, "scheduler": lr_scheduler}


def _attempt_of(state: TrainerState) -> tuple[Any, int]:
    """The trial of a search, and the number of samples in a batch."""
    return (state.trial_name, state.trial_params), state.train_batch_size or 0

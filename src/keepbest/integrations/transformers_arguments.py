"""What the training arguments of the Trainer say of the metric: its name, its direction, and whether it ever comes."""

from __future__ import annotations

from transformers import IntervalStrategy, TrainerState, TrainingArguments

from keepbest.errors import ConfigError
from keepbest.metric_properties import MetricPropertyProvider

PREFIX = "eval_"  # of what an evaluation of the training reports


def reported_key(args: TrainingArguments, metric_key: str | None) -> str:
    """The name under which an evaluation reports the metric, by the rule of the Trainer for `metric_for_best_model`.

    Raises:
        ConfigError: If neither names one.
    """
    key = args.metric_for_best_model if metric_key is None else metric_key
    if key is None:
        raise ConfigError("no metric is named: set metric_key, or metric_for_best_model of the training arguments")
    return key if key.startswith(PREFIX) else PREFIX + key


def direction(args: TrainingArguments, key: str) -> bool | None:
    """Whether a higher value of the metric is better; `None` where its name alone decides.

    Raises:
        ConfigError: If the arguments and the name of the metric contradict each other.
    """
    if args.metric_for_best_model is None or key != reported_key(args, None):
        return None
    try:
        by_name = MetricPropertyProvider().higher_is_better(key)
    except ConfigError:
        return args.greater_is_better
    if by_name != args.greater_is_better:
        raise ConfigError(
            f"greater_is_better of the training arguments is {args.greater_is_better} for {key!r}, but its name "
            f"says {by_name}; where it is not set, it is guessed from whether the name ends in 'loss'. "
            "Set it, and higher_is_better of BestCheckpoint"
        )
    return by_name


def refuse_if_never_evaluated(args: TrainingArguments, state: TrainerState) -> None:
    """Raise `ConfigError` if training ends before its first evaluation."""
    # Counted in what the strategy counts. Versions of the Trainer differ in whether they evaluate after the last step.
    strategy = IntervalStrategy(args.eval_strategy).value
    ends = {"steps": state.max_steps, "epoch": state.num_train_epochs}.get(strategy, -1)
    if args.eval_delay > ends:
        raise ConfigError(
            f"there is no evaluation with eval_strategy={strategy!r} and eval_delay={args.eval_delay}, "
            f"so no best could be kept: training ends at step {state.max_steps}, in epoch {state.num_train_epochs}. "
            "Change these training arguments"
        )

"""Hugging Face's Trainer: its checkpoints, its `load_best_model_at_end` and its early stopping are the oracle."""

from __future__ import annotations

import warnings
from pathlib import Path

import safetensors.torch
from accelerate.utils import FullyShardedDataParallelPlugin
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from keepbest.integrations.transformers import BestCheckpoint
from tests.integrations.faces.face import (
    VALUES,
    Compared,
    Trained,
    UpdateFace,
    best_three,
    failing,
    use_ranks,
    weights_of,
    whole_weights,
)
from tests.integrations.faces.on_accelerate import FSDP, Model, examples, shard_on_cpu

WHOLE = len(VALUES)


class ScriptedTrainer(Trainer):
    """Its `eval_score` after the k-th step is the k-th of the values; it breaks down instead of step `fails_at`."""

    def __init__(self, values, fails_at=None, **settings):
        super().__init__(**{"compute_metrics": self.look_up, **settings})
        self.values, self.fails_at = values, fails_at

    def look_up(self, _):
        return {"score": self.values[self.state.global_step - 1]}

    def training_step(self, *arguments, **named):
        if self.state.global_step + 1 == self.fails_at:
            raise ZeroDivisionError
        return super().training_step(*arguments, **named)


class ShardedTrainer(ScriptedTrainer):
    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        shard_on_cpu(self.accelerator, FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args))
        self.is_fsdp_enabled = True


class Recorder(TrainerCallback):
    """The whole weights at each evaluation."""

    def __init__(self):
        self.weights = []

    def on_evaluate(self, args, state, control, **kwargs):
        self.weights.append(whole_weights(kwargs["model"]))


def make_trainer(directory, values=VALUES, callbacks=(), *, strategy="ddp", trainer=None, **arguments):
    """A trainer of as many steps as there are values; `trainer` has further settings of it."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    use_ranks()
    if strategy.startswith("fsdp"):
        arguments |= {"fsdp": True, "fsdp_config": {"version": int(strategy[-1]), **FSDP}}
    arguments = {
        "per_device_train_batch_size": 2,
        "max_steps": len(values),
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "metric_for_best_model": "score",
        "greater_is_better": False,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **arguments,
    }
    data = examples(24)
    return (ShardedTrainer if strategy.startswith("fsdp") else ScriptedTrainer)(
        values,
        **{
            "model": Model(),
            "args": TrainingArguments(str(directory), use_cpu=True, **arguments),
            "train_dataset": data,
            "eval_dataset": data[:4],
            "callbacks": list(callbacks),
            **(trainer or {}),
        },
    )


def adapters_of(trainer):
    """Those that it has now: it may have made them anew from a checkpoint."""
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, BestCheckpoint)]


class Transformers(UpdateFace):
    """`framework` has training arguments."""

    ref = "best_model.eval_score"
    strategies = ("alone", "ddp", "fsdp1", "fsdp2")
    missing = "'eval_accuracy' was not reported by the evaluation; reported: epoch, eval_loss.*, eval_score"
    resumes = (
        (
            "best-only",
            [(WHOLE, 5), (WHOLE, None)],
            {"framework": {"save_strategy": "best", "eval_on_start": True}},
        ),
        (
            "adapter-made-anew",
            [(WHOLE, 6), (WHOLE, None)],
            {"framework": {"restore_callback_states_from_checkpoint": True}},
        ),
        (
            "saved-between-evaluations",
            [(WHOLE, 5), (WHOLE, None)],
            {"save_every": 3, "framework": {"eval_steps": 2, "eval_on_start": True}},
        ),
        (
            "accumulated-gradients",
            [(WHOLE, 5), (WHOLE, None)],
            {"framework": {"gradient_accumulation_steps": 3}},
        ),
        ("fsdp2", [(WHOLE, 6), (WHOLE, None)], {"strategy": "fsdp2", "save_every": 2}),
    )

    def model(self):
        return Model()

    def construct(self, root, **settings):
        return BestCheckpoint(**settings)

    def train(
        self, root, values, *, strategy="ddp", save_every=1, resume_from=None, fails_at=None, beside=None,
        framework=None, **settings,
    ):  # fmt: skip
        saves = {"save_strategy": "no"} if save_every is None else {"save_steps": save_every}
        trainer = make_trainer(
            root,
            values,
            [self.construct(root, **each) for each in (settings, beside) if each is not None],
            strategy=strategy,
            trainer={"fails_at": fails_at},
            **{**saves, **(framework or {})},
        )
        with failing(fails_at):
            trainer.train(resume_from_checkpoint=resume_from)
        keepers = [adapter.keeper for adapter in adapters_of(trainer)]
        if fails_at is not None:
            for keeper in keepers:
                keeper.abandon()  # as the end of the process would
        return Trained([keeper.state for keeper in keepers], get_last_checkpoint(root))

    def compare(self, root, strategy, **settings):
        adapter, recorder = self.construct(root, **settings), Recorder()
        trainer = make_trainer(root, VALUES, [recorder, adapter], strategy=strategy, load_best_model_at_end=True)
        trainer.train()

        def written(step):
            if strategy.startswith("fsdp"):  # of which the Trainer writes the shards
                return recorder.weights[step - 1]
            return self.weights_of_checkpoint(root / f"checkpoint-{step}")

        best = trainer.state.best_metric, weights_of(trainer.model.state_dict())
        return Compared(adapter.keeper.state, best_three(VALUES, written), best)

    def stop_early(self, root, values, patience, **settings):
        adapters = [self.construct(root, **settings)] if settings else []
        stopper = EarlyStoppingCallback(early_stopping_patience=patience)
        trainer = make_trainer(root, values, [*adapters, stopper], load_best_model_at_end=True)
        trainer.train()
        return trainer.state.global_step, trainer.state.best_metric, weights_of(trainer.model.state_dict())

    def weights_of_checkpoint(self, path):
        return weights_of(safetensors.torch.load_file(Path(path) / "model.safetensors"))

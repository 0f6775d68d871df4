"""Hugging Face's Trainer: its checkpoints, its `load_best_model_at_end` and its early stopping are the oracle."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import ClassVar

import safetensors.torch
from accelerate.utils import FullyShardedDataParallelPlugin
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from keepbest.integrations.transformers import BestCheckpoint
from tests.integrations.faces import face
from tests.integrations.faces.on_accelerate import FSDP, Model, examples, shard_on_cpu


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
        self.weights.append(face.whole_weights(kwargs["model"]))


def make_trainer(directory, values=face.VALUES, callbacks=(), *, strategy="ddp", trainer=None, **arguments):
    """A trainer of as many steps as there are values; `trainer` has further settings of it."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    face.use_ranks()
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


class Transformers(face.Face):
    """`framework` has training arguments."""

    ref = "best_model.eval_score"
    strategies = ("alone", "ddp", "fsdp1", "fsdp2")
    resumed_by = r"train\(resume_from_checkpoint=True\), or resume='ledger' of BestCheckpoint"
    missing = "'eval_accuracy' was not reported by the evaluation; reported: epoch, eval_loss.*, eval_score"
    resumes: ClassVar = {
        "best-only": {"fails_at": [5], "framework": {"save_strategy": "best", "eval_on_start": True}},
        "adapter-made-anew": {"fails_at": [6], "framework": {"restore_callback_states_from_checkpoint": True}},
        "saved-between-evaluations": {
            "fails_at": [5],
            "save_every": 3,
            "framework": {"eval_steps": 2, "eval_on_start": True},
        },
        "accumulated-gradients": {"fails_at": [5], "framework": {"gradient_accumulation_steps": 3}},
        "fsdp2": {"fails_at": [6], "strategy": "fsdp2", "save_every": 2},
    }

    def model(self):
        return Model()

    def construct(self, root, **settings):
        return BestCheckpoint(**settings)

    def run(self, training, keepers):
        save_every = training.save_every
        saves = {"save_strategy": "no"} if save_every is None else {"save_steps": save_every}
        arguments = {"trainer": {"fails_at": training.fails_at}, "strategy": training.strategy, **saves}
        adapters = [self.construct(training.root, **each) for each in keepers]
        trainer = make_trainer(training.root, training.values, adapters, **{**arguments, **training.framework})
        with face.failing(training.fails_at):
            trainer.train(resume_from_checkpoint=training.resume_from)
        # It may have made the adapters anew from a checkpoint.
        callbacks = trainer.callback_handler.callbacks
        keepers = [callback.keeper for callback in callbacks if isinstance(callback, BestCheckpoint)]
        if training.fails_at is not None:
            for keeper in keepers:
                keeper.abandon()
        return face.Trained([keeper.state for keeper in keepers], get_last_checkpoint(training.root))

    def compare(self, root, strategy, **settings):
        adapter, recorder = self.construct(root, **settings), Recorder()
        is_sharded = strategy.startswith("fsdp")  # then the Trainer writes shards, and rarely because that takes long
        arguments = {"load_best_model_at_end": True, "save_steps": 2 if is_sharded else 1}
        trainer = make_trainer(root, face.VALUES, [recorder, adapter], strategy=strategy, **arguments)
        trainer.train()

        def whole(step):
            return recorder.weights[step - 1] if is_sharded else self.weights_of_checkpoint(root / f"checkpoint-{step}")

        best = trainer.state.best_metric, face.weights_of(trainer.model.state_dict())
        return face.Compared(adapter.keeper.state, face.best_three(whole), best)

    def stop_early(self, root, values, patience, **settings):
        adapters = [self.construct(root, **settings)] if settings else []
        stopper = EarlyStoppingCallback(early_stopping_patience=patience)
        trainer = make_trainer(root, values, [*adapters, stopper], load_best_model_at_end=True)
        trainer.train()
        return trainer.state.global_step, trainer.state.best_metric, face.weights_of(trainer.model.state_dict())

    def weights_of_checkpoint(self, path):
        return face.weights_of(safetensors.torch.load_file(Path(path) / "model.safetensors"))

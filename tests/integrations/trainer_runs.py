"""Runs of Hugging Face's Trainer on real ranks; what they leave, as a user would read it."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from keepbest import load
from keepbest.integrations.transformers import BestCheckpoint
from keepbest.run.reader import read_history
from tests.kit.runs import refs

BEST = "best_model.eval_score"
VALUES = [5.0, 3.0, 4.0, 6.0, 3.5, 2.0, 7.0, 2.5]


class Model(nn.Module):
    """Learns a little at each step, so that the weights of all differ; it counts its batches in training."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Dropout(0.2), nn.Linear(4, 1))
        self.register_buffer("batches", torch.zeros(1))

    def forward(self, inputs, labels):
        self.batches += self.training
        outputs = self.layers(inputs)
        return {"loss": (outputs - labels).square().mean(), "logits": outputs}


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
    """Accelerate leaves its FSDP plugin aside where there is no GPU, but it works."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        shard_on_cpu(self.accelerator, FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args))
        self.is_fsdp_enabled = True


def shard_on_cpu(accelerator, plugin):
    accelerator.state.fsdp_plugin = plugin
    for state in (PartialState(), accelerator.state):  # the first is copied to the second again and again
        state.distributed_type = DistributedType.FSDP
        state.device = torch.device("cpu")  # Accelerate calls it cpu:0


def use_ranks():
    """As torchrun would have told them; the process group is there already."""
    if dist.is_initialized():
        rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def make_trainer(directory, values=VALUES, callbacks=(), *, strategy="ddp", trainer=None, **arguments):
    """A trainer of as many steps as there are values; `trainer` has further settings of it."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    use_ranks()
    if strategy.startswith("fsdp"):
        plugin = {
            "version": int(strategy[-1]),
            "auto_wrap_policy": "SIZE_BASED_WRAP",
            "min_num_params": 16,  # the root keeps weights of its own
            "state_dict_type": "SHARDED_STATE_DICT",
            "sync_module_states": False,
        }
        arguments |= {"fsdp": True, "fsdp_config": plugin}
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
    random = torch.Generator().manual_seed(1)
    data = [{"inputs": torch.randn(3, generator=random), "labels": torch.randn(1, generator=random)} for _ in range(24)]
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


def run_in_pieces(directory, pieces, settings, arguments):
    """Trains piece by piece, each from the last checkpoint of the one before; a piece may end in the middle.

    Returns:
        The state of each keeper.
    """
    for number, (values, fails_at) in enumerate(pieces):
        best = [BestCheckpoint(**{"tolerances": [0, 1, 2], "keep_top_k": 3, **each}) for each in settings]
        trainer = make_trainer(directory, values, best, trainer={"fails_at": fails_at}, **arguments)
        if fails_at is None:
            trainer.train(resume_from_checkpoint=number > 0)
        else:
            with pytest.raises(ZeroDivisionError):
                trainer.train(resume_from_checkpoint=number > 0)
            abandon_all(trainer)
    return [callback.keeper.state for callback in callbacks_of(trainer)]


def callbacks_of(trainer):
    """Those that it has now: it may have made them anew from a checkpoint."""
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, BestCheckpoint)]


def abandon_all(trainer):
    """What the end of the process would do."""
    for callback in callbacks_of(trainer):
        callback.keeper.abandon()


def kept(directory):
    """{ref: (iteration, value, weights)} of what keepbest kept, loaded by its own loader into a fresh model."""
    found = {}
    for ref in refs(Path(directory)):
        model = Model()
        loaded = load(directory, ref, model)
        found[ref.removeprefix(BEST)] = (str(loaded.iteration), loaded.value, weights_of(model.state_dict()))
    return found


def observed(directory, name=BEST):
    """[(iteration, value)] of the timeline that led to the present state."""
    entries = read_history(Path(directory)).keepers[name].present.entries
    return [(str(entry.observation.iteration), entry.observation.value) for entry in entries]


def weights_of_checkpoint(path):
    """What the Trainer itself wrote."""
    return weights_of(safetensors.torch.load_file(Path(path) / "model.safetensors"))


def weights_of(state_dict):
    """Comparable with `==`, put together where they are sharded."""
    whole = {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in state_dict.items()}
    return {name: tensor.tolist() for name, tensor in whole.items()}

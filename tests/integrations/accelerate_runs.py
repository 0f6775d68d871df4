"""Loops of Accelerate on real ranks."""

from __future__ import annotations

import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader

from keepbest import TrainingIteration
from keepbest.integrations.accelerate import AcceleratedKeeper
from tests.integrations.trainer_runs import VALUES, Model, shard_on_cpu, use_ranks, weights_of

METRIC = "eval_score"
ACCUMULATED = 2  # batches in each update


def make_accelerator(strategy="ddp", **settings):
    """With FSDP as the plugin of Accelerate has it."""
    warnings.simplefilter("ignore")
    use_ranks()
    if strategy == "ddp":
        return Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED, **settings)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=int(strategy[-1]),
        auto_wrap_policy="size_based_wrap",
        min_num_params=16,  # the root keeps weights of its own
        state_dict_type="SHARDED_STATE_DICT",
        sync_module_states=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=ACCUMULATED, **settings)
    shard_on_cpu(accelerator, plugin)
    return accelerator


def whole_weights(accelerator, model):
    """As Accelerate puts them together on rank 0; FSDP1 does it where torch would crash without a GPU."""
    if not isinstance(model, FullyShardedDataParallel):
        return weights_of(accelerator.get_state_dict(model))
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        named = [*model.named_parameters(), *model.named_buffers()]
        return weights_of({name.replace("_fsdp_wrapped_module.", ""): tensor for name, tensor in named})


class Loop:
    """Trains a model with gradient accumulation; what it observes after the k-th update is the k-th value."""

    def __init__(self, directory, strategy="ddp", project=None, **settings):
        self.accelerator = make_accelerator(strategy, project_config=project)
        random = torch.Generator().manual_seed(1)
        data = [
            {"inputs": torch.randn(3, generator=random), "labels": torch.randn(1, generator=random)} for _ in range(64)
        ]
        model = Model()
        if strategy == "fsdp1":  # which wants its optimizer to be made of the parameters that it has made
            model = self.accelerator.prepare(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # Accelerate brings no state of Adam back for FSDP1
        self.model, self.optimizer, self.batches = self.accelerator.prepare(
            model, optimizer, DataLoader(data, batch_size=2)
        )
        self.keeper = AcceleratedKeeper(
            self.accelerator, self.model, directory=directory, metric_key=METRIC, higher_is_better=False, **settings
        )
        self.update = 0
        self.weights = {}  # at each update
        self.accelerator.register_for_checkpointing(self)

    def state_dict(self):
        return {"update": self.update}

    def load_state_dict(self, state_dict):
        self.update = state_dict["update"]

    def train(self, values=VALUES, *, save_every=None, fails_at=None, resume_from=None, save_to=None):
        """Takes the first batches away where it is resumed, as Accelerate asks of its users."""
        if resume_from is not None:
            self.accelerator.load_state(resume_from)
        batches = self.accelerator.skip_first_batches(self.batches, ACCUMULATED * self.update)
        with self.keeper:
            for batch in batches:
                if self.update + 1 == fails_at:
                    raise ZeroDivisionError
                torch.manual_seed(
                    self.update
                )  # an iterator of batches, which each start makes anew, draws a number too
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(self.model(**batch)["loss"])
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                if not self.accelerator.sync_gradients:
                    continue
                self.update += 1
                self.keeper.observe(values[self.update - 1], TrainingIteration(update=self.update))
                self.weights[self.update] = whole_weights(self.accelerator, self.model)
                if save_every is not None and self.update % save_every == 0:
                    self.accelerator.save_state(save_to)
                if self.update == len(values):
                    return


def run_in_pieces(directory, pieces, settings):
    """Trains piece by piece, each from the last saved state of the one before; a piece may end in the middle."""
    for number, (fails_at, save_every) in enumerate(pieces):
        loop = Loop(directory, tolerances=[0, 1, 2], keep_top_k=3, **settings)
        state = directory / "state"
        arguments = {"save_every": save_every, "save_to": state, "resume_from": state if number else None}
        if fails_at is None:
            loop.train(**arguments)
        else:
            with pytest.raises(ZeroDivisionError):
                loop.train(fails_at=fails_at, **arguments)
    return loop.keeper.state

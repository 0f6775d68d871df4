"""Accelerate: what it puts together and saves is the oracle; the loop is the user's."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import ClassVar

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader

from keepbest import TrainingIteration
from keepbest.integrations.accelerate import AcceleratedKeeper
from tests.integrations.faces import face
from tests.integrations.faces.on_accelerate import FSDP, Model, examples, shard_on_cpu

ACCUMULATED = 2  # batches in each update


def make_accelerator(strategy="ddp", **settings):
    warnings.simplefilter("ignore")
    face.use_ranks()
    if not strategy.startswith("fsdp"):
        return Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED, **settings)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=int(strategy[-1]), **FSDP)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=ACCUMULATED, **settings)
    shard_on_cpu(accelerator, plugin)
    return accelerator


class Loop:
    """Trains a model with gradient accumulation; what its keepers observe after the k-th update is the k-th value."""

    def __init__(self, root, *keepers, strategy="ddp", project=None):
        self.accelerator = make_accelerator(strategy, project_config=project)
        model = Model()
        if strategy == "fsdp1":  # which wants its optimizer to be made of the parameters that it has made
            model = self.accelerator.prepare(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # Accelerate brings no state of Adam back for FSDP1
        self.model, self.optimizer, self.batches = self.accelerator.prepare(
            model, optimizer, DataLoader(examples(64), batch_size=2)
        )
        self.keepers = [self.keeper(**{"directory": root, **each}) for each in keepers]
        self.update = 0
        self.weights = {}  # at each update
        self.accelerator.register_for_checkpointing(self)

    def keeper(self, **settings):
        settings = {"metric_key": "eval_score", "higher_is_better": False, **settings}
        return AcceleratedKeeper(self.accelerator, self.model, **settings)

    def state_dict(self):
        return {"update": self.update}

    def load_state_dict(self, state_dict):
        self.update = state_dict["update"]

    def train(self, values=face.VALUES, *, save_every=None, fails_at=None, resume_from=None, save_to=None):
        """Takes the first batches away where it is resumed, as Accelerate asks of its users."""
        if resume_from is not None:
            self.accelerator.load_state(resume_from)
        batches = self.accelerator.skip_first_batches(self.batches, ACCUMULATED * self.update)
        with ExitStack() as stack:
            for keeper in self.keepers:
                stack.enter_context(keeper)
            for batch in batches:
                if self.update + 1 == fails_at:
                    raise ZeroDivisionError
                # An iterator of batches, which each start makes anew, draws a number too.
                torch.manual_seed(self.update)
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(self.model(**batch)["loss"])
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                if not self.accelerator.sync_gradients:
                    continue
                self.update += 1
                for keeper in self.keepers:
                    keeper.observe(values[self.update - 1], TrainingIteration(update=self.update))
                self.weights[self.update] = self.whole_weights()
                if save_every is not None and self.update % save_every == 0:
                    self.accelerator.save_state(save_to)
                if self.update == len(values):
                    return

    def whole_weights(self):
        """As Accelerate puts them together on rank 0; for FSDP1 torch does, where Accelerate would crash on a CPU."""
        if isinstance(self.model, FullyShardedDataParallel):
            return face.whole_weights(self.model)
        return face.weights_of(self.accelerator.get_state_dict(self.model))


class Accelerate(face.Face):
    ref = "best_model.eval_score"
    strategies = ("alone", "ddp", "fsdp1", "fsdp2")
    resumed_by = r"accelerator.load_state\(...\) when the keeper is there and has not started"
    resumes: ClassVar = {name: {"fails_at": [6], "strategy": name, "save_every": 2} for name in ("fsdp1", "fsdp2")}

    def model(self):
        return Model()

    def construct(self, root, **settings):
        return Loop(root, settings).keepers[0]

    def run(self, training, keepers):
        loop = Loop(training.root, *keepers, strategy=training.strategy)
        state = training.root / "state"
        with face.failing(training.fails_at):
            loop.train(
                training.values,
                save_every=training.save_every,
                save_to=state,
                fails_at=training.fails_at,
                resume_from=training.resume_from,
            )
        return face.Trained([keeper.state for keeper in loop.keepers], state)

    def compare(self, root, strategy, **settings):
        loop = Loop(root, settings, strategy=strategy)
        loop.train()
        if loop.accelerator.is_main_process:
            assert len({str(each) for each in loop.weights.values()}) == len(face.VALUES)
        return face.Compared(loop.keepers[0].state, face.best_three(loop.weights.get))

    def weights_of_checkpoint(self, path):
        return face.weights_of(safetensors.torch.load_file(path / "model.safetensors"))

"""Runs of Ignite's engines on real ranks; what they leave, as a user would read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver, global_step_from_engine
from ignite.metrics import Average
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from keepbest import load
from tests.kit.runs import refs

METRIC = "loss"
BEST = "best_model.loss"
UPDATES = 2  # in each epoch, on each rank


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


@dataclass
class Run:
    """Learns a little in each epoch, so that the weights of all differ; its validation loss is given, by epoch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    trainer: Engine
    evaluator: Engine
    batches: list[torch.Tensor]

    def train(self, epochs):
        self.trainer.run(self.batches, max_epochs=epochs)


def make_run(values, *, strategy="ddp", fails_at=None, evaluate_at=Events.EPOCH_COMPLETED):
    """The engines, without handlers that keep anything; values are by epoch, or by evaluation where there are more."""
    model = network()
    if idist.get_world_size() > 1 and strategy == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (idist.get_world_size(),)))
    elif idist.get_world_size() > 1 and strategy == "ddp":
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def learn(engine, batch):
        if (engine.state.epoch, engine.state.iteration % UPDATES) == (fails_at, 0):
            raise ZeroDivisionError
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    trainer = Engine(learn)
    # The ranks have values around the given one, of which it is the mean.
    offset = [0.0] if idist.get_world_size() == 1 else [-8.0, 8.0]
    evaluator = Engine(lambda *_: values[trainer.state.epoch - 1] + offset[idist.get_rank()])
    Average().attach(evaluator, METRIC)
    trainer.add_event_handler(evaluate_at, lambda: evaluator.run([None]))
    torch.manual_seed(1 + idist.get_rank())
    return Run(model, optimizer, trainer, evaluator, [torch.randn(4, 3) for _ in range(UPDATES)])


def keep_peer(directory, run, n_saved):
    """Ignite's own `Checkpoint` of the best."""
    peer = Checkpoint(
        {"model": run.model},
        directory,
        score_function=Checkpoint.get_default_score_fn(METRIC, -1.0),
        n_saved=n_saved,
        global_step_transform=global_step_from_engine(run.trainer),
    )
    run.evaluator.add_event_handler(Events.COMPLETED, peer)
    return peer


class Resume:
    """What a run is resumed from: Ignite's own `Checkpoint` of everything, and `load_objects`."""

    def __init__(self, directory, run, best):
        self.directory = directory
        self.objects = {"model": run.model, "optimizer": run.optimizer, "trainer": run.trainer, "best": best}
        self.write = Checkpoint(self.objects, DiskSaver(directory, require_empty=False), n_saved=1)

    def load(self):
        if paths := sorted(self.directory.glob("*.pt"), key=lambda path: int(path.stem.rpartition("_")[2])):
            Checkpoint.load_objects(self.objects, paths[-1])


def kept(directory):
    """{ref: (iteration, value, weights)} of what keepbest kept, loaded by its own loader into a fresh model."""
    found = {}
    for ref in refs(Path(directory)):
        model = network()
        loaded = load(directory, ref, model)
        found[ref.removeprefix(BEST)] = (str(loaded.iteration), loaded.value, weights_of(model.state_dict()))
    return found


def weights_of(state_dict):
    """Comparable with `==`."""
    return {name: tensor.tolist() for name, tensor in state_dict.items()}


def weights_of_checkpoint(path):
    return weights_of(torch.load(path, weights_only=True))

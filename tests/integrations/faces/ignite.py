"""PyTorch-Ignite: its Checkpoint and EarlyStopping are the oracle."""

from __future__ import annotations

from dataclasses import dataclass

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver, EarlyStopping, global_step_from_engine
from ignite.metrics import Average
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from keepbest.integrations.ignite import BestCheckpoint
from tests.integrations.faces import face

METRIC = "loss"
UPDATES = 2  # in each epoch


@dataclass
class Engines:
    """Learns a little in each epoch, so that the weights of all differ; the mean of its metric over ranks is given."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    trainer: Engine
    evaluator: Engine
    batches: list[torch.Tensor]

    def attach(self, root, **settings):
        adapter = BestCheckpoint(self.model, **{"metric_key": METRIC, "directory": root, **settings})
        adapter.attach(self.trainer, self.evaluator)
        return adapter

    def train(self, epochs):
        self.trainer.run(self.batches, max_epochs=epochs)


def make_engines(values, *, strategy="ddp", fails_at=None, evaluate_at=Events.EPOCH_COMPLETED):
    """Without handlers that keep anything."""
    model = face.network()
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
    evaluator = Engine(lambda *_: face.given(values[trainer.state.epoch - 1]))
    Average().attach(evaluator, METRIC)
    trainer.add_event_handler(evaluate_at, lambda: evaluator.run([None]))
    # Without a strategy nothing brings the ranks together, so they learn from the same batches.
    torch.manual_seed(1 if strategy == "none" else 1 + idist.get_rank())
    return Engines(model, optimizer, trainer, evaluator, [torch.randn(4, 3) for _ in range(UPDATES)])


class Peer(Checkpoint):
    """Ignite's own, of the best."""

    def __init__(self, root, engines, n_saved):
        super().__init__(
            {"model": engines.model},
            root / str(n_saved),
            score_function=Checkpoint.get_default_score_fn(METRIC, -1.0),
            n_saved=n_saved,
            global_step_transform=global_step_from_engine(engines.trainer),
        )
        engines.evaluator.add_event_handler(Events.COMPLETED, self)

    def ours(self, framework):
        """[(value, weights)], best first."""
        saved = sorted((-each.priority, each.filename) for each in self._saved)
        return [(value, framework.weights_of_checkpoint(self.save_handler.dirname / name)) for value, name in saved]


class Resume:
    """What training is resumed from: Ignite's own `Checkpoint` of everything, and `load_objects`."""

    def __init__(self, root, engines, *adapters):
        self.directory = root / "resume"
        self.objects = {"model": engines.model, "optimizer": engines.optimizer, "trainer": engines.trainer}
        self.objects |= {f"best{number}": adapter for number, adapter in enumerate(adapters)}
        self.write = Checkpoint(self.objects, DiskSaver(self.directory, require_empty=False), n_saved=1)

    @property
    def newest(self):
        paths = self.directory.glob("*.pt")
        return max(paths, key=lambda path: int(path.stem.rpartition("_")[2]), default=None)

    def load(self, path):
        if path is not None:
            Checkpoint.load_objects(self.objects, path)


class Ignite(face.Face):
    """`framework` has settings of `make_engines`."""

    ref = "best_model.loss"
    strategies = ("alone", "ddp", "fsdp2")
    resumed_by = r"Checkpoint.load_objects with this handler in to_load"
    updates = UPDATES
    missing = "'accuracy' is not among the metrics of the evaluator; there are: loss"

    def model(self):
        return face.network()

    def construct(self, root, **settings):
        return BestCheckpoint(face.network(), METRIC, directory=root, **settings)

    def run(self, training, keepers):
        arguments = {"strategy": training.strategy, "fails_at": training.fails_at, **training.framework}
        engines = make_engines(training.values, **arguments)
        adapters = [engines.attach(training.root, **each) for each in keepers]
        resume = Resume(training.root, engines, *adapters)
        if training.save_every is not None:
            engines.trainer.add_event_handler(Events.EPOCH_COMPLETED(every=training.save_every), resume.write)
        resume.load(training.resume_from)
        with face.failing(training.fails_at):
            engines.train(len(training.values))
        return face.Trained([adapter.keeper.state for adapter in adapters], resume.newest)

    def compare(self, root, strategy, **settings):
        engines = make_engines(face.VALUES, strategy=strategy)
        adapter, whole = engines.attach(root, **settings), []
        if strategy == "fsdp2":  # of which Ignite's Checkpoint writes the shards of one rank
            record = lambda: whole.append(face.whole_weights(engines.model))  # noqa: E731
            engines.evaluator.add_event_handler(Events.COMPLETED, record)
            engines.train(len(face.VALUES))
            return face.Compared(adapter.keeper.state, face.best_three(lambda step: whole[step - 1]))
        one, three = Peer(root, engines, 1), Peer(root, engines, 3)
        engines.train(len(face.VALUES))
        idist.barrier()
        return face.Compared(adapter.keeper.state, three.ours(self), *one.ours(self))

    def stop_early(self, root, values, patience, stopper=None, **settings):
        """`stopper` has further settings of the early stopping."""
        engines = make_engines(values)
        if settings:
            engines.attach(root, **settings)
        peer = Peer(root, engines, 1)
        stopping = EarlyStopping(patience, peer.score_function, engines.trainer, **(stopper or {}))
        engines.evaluator.add_event_handler(Events.COMPLETED, stopping)
        engines.train(len(values))
        idist.barrier()
        [(_, weights)] = peer.ours(self)
        return engines.trainer.state.epoch, -stopping.best_score, weights

    def weights_of_checkpoint(self, path):
        state = torch.load(path, weights_only=True)
        return face.weights_of(state.get("model", state))

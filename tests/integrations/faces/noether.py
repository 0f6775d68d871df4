"""noether's own trainer: its BestCheckpointCallback, CheckpointCallback and MetricEarlyStopper are the oracle."""

from __future__ import annotations

import logging
import warnings
from typing import Literal

import torch
from noether.core.callbacks import PeriodicCallback
from noether.core.distributed import barrier
from noether.core.models import CompositeModel, Model
from noether.core.providers import MetricPropertyProvider, PathProvider
from noether.core.schemas import BaseTrainerConfig
from noether.core.schemas.callbacks import CallBackBaseConfig
from noether.core.schemas.dataset import DatasetBaseConfig
from noether.core.schemas.initializers import ResumeInitializerConfig
from noether.core.schemas.models import ModelBaseConfig
from noether.core.trackers.noop import NoopTracker
from noether.data import Dataset
from noether.data.container import DataContainer
from noether.data.pipeline.collator import Collator
from noether.training.trainers import BaseTrainer
from pydantic import ValidationError

from keepbest.errors import ConfigError
from keepbest.integrations.noether import BestCheckpointCallback, BestCheckpointCallbackConfig
from tests.integrations.faces import face

METRIC = "loss/val/total"
UPDATES = 2  # in each epoch
SAMPLES = 2  # in each update, of all ranks
OURS = "keepbest.integrations.noether.BestCheckpointCallback"
OWN = {"kind": "noether.core.callbacks.BestCheckpointCallback", "metric_key": METRIC, "every_n_epochs": 1}
OPTIMIZER = {"kind": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}


class Config(ModelBaseConfig):
    outputs: int = 1


class Part(Model):
    def __init__(self, model_config, **settings):
        super().__init__(model_config, **settings)
        torch.manual_seed(model_config.outputs)
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, model_config.outputs))

    def forward(self, inputs):
        return self.layers(inputs)


class Network(CompositeModel):
    """Two submodels, whose names are not those of its attributes."""

    def __init__(self, model_config, **settings):
        super().__init__(model_config, **settings)
        self.first = Part(Config(name="encoder", outputs=3, optimizer_config=OPTIMIZER), **settings)
        self.second = Part(Config(name="decoder", optimizer_config=OPTIMIZER), **settings)

    @property
    def submodels(self):
        return {"first": self.first, "second": self.second}

    def forward(self, inputs):
        return self.second(self.first(inputs))


class Numbers(Dataset):
    """All alike: on CPUs noether brings no gradients of ranks together."""

    def __len__(self):
        return UPDATES * SAMPLES

    def getitem_inputs(self, idx):
        return torch.ones(3)


class ScriptedTrainer(BaseTrainer):
    """Breaks down in the second update of the epoch `fails_at`."""

    fails_at = None

    def loss_compute(self, forward_output, targets):
        counter = self.update_counter
        if (counter.cur_iteration.epoch + 1, counter.cur_iteration.update % UPDATES) == (self.fails_at, 1):
            raise ZeroDivisionError
        return {"total": forward_output.square().mean()}


class LogsConfig(CallBackBaseConfig):
    name: Literal["Logs"] = "Logs"
    values: list[float]


class Logs(PeriodicCallback):
    """Logs the value of the epoch."""

    def __init__(self, callback_config: LogsConfig, **settings):
        super().__init__(callback_config, **settings)
        self.values = callback_config.values

    def periodic_callback(self, *, interval_type, update_counter, **_):
        self.writer.add_scalar(METRIC, face.given(self.values[update_counter.cur_iteration.epoch - 1]))


def saves(every):
    """noether's own callback that writes what a run is resumed from."""
    kind = "noether.core.callbacks.CheckpointCallback"
    return {"kind": kind, "every_n_epochs": every, "save_optim": True}


def train(root, values, callbacks, *, resume_from=None, fails_at=None, run_id="run"):
    """Trains in `root/<run_id>` with callbacks as a YAML file has them; `resume_from` is what noether wrote last."""
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    face.use_ranks()
    paths, properties = PathProvider(root, run_id), MetricPropertyProvider()
    data = Numbers(DatasetBaseConfig(kind="Numbers"))
    data.pipeline = Collator()
    container = DataContainer({"train": data}, num_workers=0, pin_memory=False)
    resumed = None
    if resume_from is not None:
        of_run = {"run_id": resume_from.parents[1].name, "checkpoint_tag": tag_of(resume_from)}
        resumed = ResumeInitializerConfig(model_name="network", **of_run)
    config = BaseTrainerConfig(
        kind=f"{__name__}.ScriptedTrainer",
        max_epochs=len(values),
        effective_batch_size=SAMPLES,
        callbacks=[{"kind": f"{__name__}.Logs", "every_n_epochs": 1, "values": values}, *callbacks],
        add_default_callbacks=False,
        initializer=resumed,
        forward_properties=["inputs"],
    )
    trainer = ScriptedTrainer(
        config,
        data_container=container,
        device="cpu",
        tracker=NoopTracker(properties, paths),
        path_provider=paths,
        metric_property_provider=properties,
    )
    trainer.fails_at = fails_at
    settings = {"update_counter": trainer.update_counter, "path_provider": paths, "data_container": container}
    try:
        trainer.train(Network(Config(name="network"), **settings))
    finally:
        logging.disable(logging.NOTSET)
        trainer.keepers = [each.keeper for each in trainer.callbacks if isinstance(each, BestCheckpointCallback)]
        for keeper in trainer.keepers:
            if keeper is not None:
                keeper.abandon()  # as the end of the process does
    return trainer


def tag_of(path):
    return path.name.removeprefix("network_cp=").removesuffix("_trainer.th")


def newest_in(root):
    """Of all runs: that with the most updates."""
    found = root.glob("*/checkpoints/network_cp=E*_trainer.th")
    return max(found, key=lambda path: int(tag_of(path).split("_")[1][1:]), default=None)


def weights_in(folder, tag):
    """Of both submodels, which have files of their own."""
    found = {}
    for name in ("first", "second"):
        state = torch.load(folder / f"network.{name}_cp={tag}_model.th", weights_only=True)["state_dict"]
        found |= {f"{name}.{key}": value for key, value in state.items()}
    return face.weights_of(found)


def own_best(root):
    return weights_in(root / "run" / "checkpoints", f"best_model.{METRIC.replace('/', '.')}")


HOOKS = []


def take_hook(number):
    return HOOKS[number]


class Noether(face.Face):
    ref = "best_model.loss.val.total"
    strategies = ("alone", "ddp")
    updates = UPDATES
    resumed_by = "resume_run_id, or resume: ledger"
    missing = "'accuracy' was not logged; logged: epoch, loss/val/total, sample, update"

    def model(self):
        return Network(Config(name="network"))

    def iteration(self, step):
        return f"{super().iteration(step)}_S{self.updates * step * SAMPLES}"

    def entry(self, root, **settings):
        """Of a YAML file."""
        settings = {"directory": str(settings.pop("directory", root)), **settings}
        if "on_new_best" in settings:  # a YAML file names what makes them
            HOOKS[:] = settings["on_new_best"]
            made = {"kind": f"{take_hook.__module__}.take_hook"}
            settings["on_new_best"] = [{**made, "number": number} for number in range(len(HOOKS))]
        return {"kind": OURS, "every_n_epochs": 1, "metric_key": METRIC, **settings}

    def construct(self, root, **settings):
        try:
            return BestCheckpointCallbackConfig.model_validate(self.entry(root, **settings))
        except ValidationError as error:  # so noether reports what is wrong in a YAML file
            raise ConfigError(str(error)) from None

    def run(self, training, keepers):
        callbacks = [self.entry(training.root, **each) for each in keepers]
        if training.save_every is not None:
            callbacks.append(saves(training.save_every))
        # Each resume is a run of its own.
        run_id = "run" if training.resume_from is None else f"after-{tag_of(training.resume_from)}"
        resumed = {"resume_from": training.resume_from, "run_id": run_id, "fails_at": training.fails_at}
        states = []
        with face.failing(training.fails_at):
            states = [keeper.state for keeper in train(training.root, training.values, callbacks, **resumed).keepers]
        barrier()  # rank 0 alone writes
        return face.Trained(states, newest_in(training.root))

    def compare(self, root, strategy, **settings):
        trainer = train(root, face.VALUES, [self.entry(root, **settings), OWN, saves(1)])
        barrier()

        def whole(step):
            [path] = root.glob(f"run/checkpoints/network_cp=E{step}_*_trainer.th")
            return self.weights_of_checkpoint(path)

        return face.Compared(trainer.keepers[0].state, face.best_three(whole), (min(face.VALUES), own_best(root)))

    def stop_early(self, root, values, patience, **settings):
        stopper = {"kind": "noether.core.callbacks.MetricEarlyStopper", "metric_key": METRIC, "tolerance": patience}
        ours = [self.entry(root, **settings)] if settings else []
        trainer = train(root, values, [*ours, OWN, {**stopper, "every_n_epochs": 1}])
        barrier()
        epoch = trainer.update_counter.cur_iteration.epoch
        return epoch, min(values[:epoch]), own_best(root)

    def weights_of_checkpoint(self, path):
        return weights_in(path.parent, tag_of(path))

"""What callbacks are given in these tests: the real things, around a small model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from keepbest.data import DataContainer
from keepbest.iteration import TrainingIteration
from keepbest.metric_properties import MetricPropertyProvider
from keepbest.models import Model
from keepbest.ranks import Ranks
from keepbest.training.counter import UpdateCounter
from keepbest.training.log_writer import LogWriter
from keepbest.training.trackers import NoTracker


class Regression(Model):
    """A float64 model with dropout, so that its losses tell whether it is in eval mode."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1)).double()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=generator)

    def forward(self, batch):
        return {"y": self.layers(batch["x"]).squeeze(1)}

    def losses(self, outputs, batch):
        error = outputs["y"] - batch["y"]
        return {"square": error**2, "absolute": error.abs(), "total": error**2 + 0.5 * error.abs()}


def make_samples(length):
    generator = torch.Generator().manual_seed(length)
    return [
        {
            "x": torch.randn(3, generator=generator, dtype=torch.float64),
            "y": torch.randn((), generator=generator, dtype=torch.float64),
        }
        for _ in range(length)
    ]


class StandInTrainer:
    """What a callback sees of a trainer that trains nothing. It keeps the reasons why it was asked to stop."""

    def __init__(self, resume=None):
        self.model = Regression()
        self.average = None
        self.optimizers, self.training_state = {}, {}
        self.update_counter = make_counter()
        self.callbacks = []
        self.resume = resume
        self.resumed_from = None
        self.is_done = False
        self.reasons = []

    def stop(self, reason):
        self.reasons.append(reason)


def make_counter(updates_per_epoch=2, effective_batch_size=12):
    return UpdateCounter(
        updates_per_epoch=updates_per_epoch, effective_batch_size=effective_batch_size, end=TrainingIteration(epoch=99)
    )


def make_context(datasets=None, *, update_counter=None, model=None):
    ranks = Ranks.connect()
    tracker = NoTracker()
    return {
        "trainer": StandInTrainer(),
        "model": model or Regression(),
        "data_container": DataContainer(datasets or {"val": make_samples(4)}),
        "log_writer": LogWriter(tracker, update_counter or make_counter(), is_main=ranks.is_main),
        "tracker": tracker,
        "metric_property_provider": MetricPropertyProvider(),
        "ranks": ranks,
        "directory": Path("unused"),
    }

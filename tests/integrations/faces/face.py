"""What a framework shows of itself to the contract of the adapters, and what the faces share."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from keepbest import load
from keepbest.run.reader import read_history
from tests.kit.runs import refs

# The metric after each step of a training; lower is better.
VALUES = [5.0, 3.0, 4.0, 6.0, 3.5, 2.0, 7.0, 2.5]

Weights = dict[str, list]  # as lists, so that two are compared with ==


@dataclass(frozen=True)
class Training:
    """What the contract asks a framework to do, on the ranks of the default process group or alone."""

    root: Path  # folder that the framework writes to, and the run too unless the adapter has a directory
    values: list[float]  # the metric after each step; the last step is len(values)
    strategy: str = "ddp"  # how several ranks train one model
    save_every: int | None = 1  # steps between two checkpoints of the framework; `None` writes none
    resume_from: Path | None = None  # the checkpoint of an earlier training
    fails_at: int | None = None  # the step that raises a ZeroDivisionError
    framework: dict[str, Any] = field(default_factory=dict)  # settings that only this framework has


@dataclass(frozen=True)
class Trained:
    """What a training leaves on one rank."""

    states: list  # of its keepers
    checkpoint: Path | None  # the newest of the framework


@dataclass(frozen=True)
class Compared:
    """What keepbest ends with on one rank, and what the framework itself has of the same training."""

    state: Any  # of the keeper
    top: list[tuple[float, Weights]]  # what the framework wrote or gathered at its three best steps; on rank 0
    best: tuple[float, Weights] | None = None  # what its own option for the best ends with; `None` if there is none


class Face(ABC):
    """One framework and its adapter. The docstring of `contract` says how to add one."""

    ref: str  # of the best
    strategies: tuple[str, ...]  # of "alone", "ddp", "fsdp1", "fsdp2": those in which it trains
    updates: int | None = None  # in a step, where a step is an epoch
    resumes: ClassVar[dict[str, dict]] = {}  # resumes that only this framework has, as in `contract.RESUMES`
    resumed_by: str  # what is said of a run that is there; a pattern
    missing: str  # what is said of a metric "accuracy" that was not computed; a pattern

    @abstractmethod
    def model(self) -> nn.Module:
        """A fresh one to load a snapshot into."""

    @abstractmethod
    def construct(self, root: Path, **settings):
        """The adapter of a run in `root`."""

    @abstractmethod
    def run(self, training: Training, keepers: list[dict]) -> Trained:
        """Trains with one adapter for each of the settings in `keepers`.

        The failure that is asked for is caught. Where the framework does not report it to the adapter, the keeper is
        abandoned as by the end of the process.
        """

    @abstractmethod
    def compare(self, root: Path, strategy: str, **settings) -> Compared:
        """Trains with `VALUES`, with the framework's own option for the best beside the adapter."""

    @abstractmethod
    def weights_of_checkpoint(self, path: Path) -> Weights:
        """What the framework wrote, by nothing of keepbest."""

    def stop_early(self, root: Path, values, patience: int, **settings) -> tuple[int, float, Weights]:
        """Trains with the framework's early stopping; with the adapter beside it only where there are settings.

        Returns:
            The last step, and the value and weights that the framework has as the best by then.
        """
        raise NotImplementedError

    def train(self, root: Path, values, *, beside: dict | None = None, **arguments) -> Trained:
        """Trains with the fields of `Training` and the settings of an adapter; `beside` has those of a second one."""
        own = {each.name: arguments.pop(each.name) for each in fields(Training) if each.name in arguments}
        return self.run(Training(root, values, **own), [arguments] if beside is None else [arguments, beside])

    def iteration(self, step: int) -> str:
        return f"U{step}" if self.updates is None else f"E{step}_U{self.updates * step}"

    def kept(self, root: Path) -> dict[str, tuple[str, float, Weights]]:
        """{ref without `self.ref`: (iteration, value, weights)}, each loaded into a fresh model."""
        found = {}
        for ref in refs(root):
            model = self.model()
            loaded = load(root, ref, model)
            found[ref.removeprefix(self.ref)] = (str(loaded.iteration), loaded.value, weights_of(model.state_dict()))
        return found

    def observed(self, root: Path, ref: str | None = None) -> list[tuple[str, float]]:
        """[(iteration, value)] of the timeline that led to the present state."""
        entries = read_history(root).keepers[ref or self.ref].present.entries
        return [(str(entry.observation.iteration), entry.observation.value) for entry in entries]


def network() -> nn.Module:
    """A network with buffers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def failing(fails_at: int | None) -> AbstractContextManager:
    return nullcontext() if fails_at is None else pytest.raises(ZeroDivisionError)


def given(value: float) -> float:
    """The value on this rank of a metric whose mean over two ranks is given."""
    return value + (0.0 if not dist.is_initialized() else [-8.0, 8.0][dist.get_rank()])


def use_ranks() -> int:
    """Sets the environment as torchrun would; the process group is there already. Returns the number of ranks."""
    if not dist.is_initialized():
        return 1
    rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    return int(ranks)


def weights_of(state_dict) -> Weights:
    """Comparable with `==`, put together where they are sharded."""
    whole = {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in state_dict.items()}
    return {name: tensor.tolist() for name, tensor in whole.items()}


def whole_weights(model: nn.Module) -> Weights:
    """What torch puts together, on every rank; for FSDP1 in the one way that does not need a GPU."""
    if not isinstance(model, FullyShardedDataParallel):
        return weights_of(model.state_dict())
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        named = [*model.named_parameters(), *model.named_buffers()]
        return weights_of({name.replace("_fsdp_wrapped_module.", ""): tensor for name, tensor in named})


def best_three(weights) -> list[tuple[float, Weights]]:
    """[(value, weights)] of the three best steps of `VALUES`, where `weights(step)` gives those of a step."""
    steps = sorted(range(1, len(VALUES) + 1), key=lambda step: VALUES[step - 1])[:3]
    return [(VALUES[step - 1], weights(step)) for step in steps]

"""A model on a GPU, training beside it, and what only a GPU can be asked to do with its weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from benchmarks import measure
from benchmarks.contestants import Action, Dcp

ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")


class Weights(nn.Module):
    """So many tensors of so many bytes on the device."""

    def __init__(self, count: int, each: int) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(nn.Parameter(torch.rand(each // 4, device=DEVICE)) for _ in range(count))

    def train_for(self, steps: int) -> None:
        """Take so many steps of an optimizer."""
        for tensor in self.tensors:
            tensor.grad = torch.zeros_like(tensor)
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-3)
        for _ in range(steps):
            optimizer.step()
        optimizer.zero_grad()

    @property
    def bytes(self) -> int:
        return measure.weight_bytes(self)


class Training:
    """A loop of steps that occupy the device for about 10 ms each."""

    def __init__(self, steps: int, width: int) -> None:
        self._steps = steps
        # Zeros need little power. With others a device at its limit is faster for a while whenever it had to wait.
        self._left = torch.zeros(width, width, device=DEVICE, dtype=torch.bfloat16)
        self._out = torch.empty_like(self._left)
        self._mark = torch.empty(1, device=DEVICE)
        self._products = 1
        for _ in range(3):
            seconds = seconds_of(self.step)
        self._products = max(round(0.01 / seconds), 1) if ON_CUDA else 1

    def step(self) -> None:
        for _ in range(self._products):
            torch.mm(self._left, self._left, out=self._out)

    def run(self, best: Callable[[], Any]) -> float:
        """Train, with one best on the way. Returns for how many seconds the device did not train because of it."""
        pause = Pause()
        for number in range(self._steps):
            if number == self._steps // 3:
                pause.begin()
                best()
                self._mark.zero_()  # the next work of training, and as long under way to the device as any
                pause.end()
            self.step()
        finish()
        return pause.seconds


class Pause:
    """The time between two places in what the current stream does; on the CPU, between two moments."""

    def __init__(self) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if ON_CUDA else []
        self._moments: list[float] = []

    def begin(self) -> None:
        self._note(0)

    def end(self) -> None:
        self._note(1)

    def _note(self, place: int) -> None:
        self._moments.append(time.perf_counter())
        if ON_CUDA:
            self._events[place].record()

    @property
    def seconds(self) -> float:
        """Once the device has come to the end."""
        if ON_CUDA:
            return self._events[0].elapsed_time(self._events[1]) / 1e3
        return self._moments[1] - self._moments[0]


class Within(Action):
    """Trains, and does one thing on the way.

    Attributes:
        lost: Seconds that training lost each time.
    """

    def __init__(self, training: Training, inner: Action) -> None:
        self._training, self._inner = training, inner
        self.lost: list[float] = []

    def prepare(self) -> None:
        self._inner.prepare()
        finish()

    def act(self) -> None:
        self.lost.append(self._training.run(self._inner.act))

    def settle(self) -> None:
        self._inner.settle()

    def end(self) -> None:
        self._inner.end()


class Pinned(Action):
    """Copies the weights into pinned memory that is kept, on the stream that trains."""

    def __init__(self, model: nn.Module) -> None:
        self._source = [value.detach() for value in model.state_dict().values()]
        self._buffers = [torch.empty(value.shape, dtype=value.dtype, pin_memory=ON_CUDA) for value in self._source]

    def act(self) -> None:
        for buffer, value in zip(self._buffers, self._source, strict=True):
            buffer.copy_(value, non_blocking=True)


def can_stage_twice() -> bool:
    """Whether a stager of this torch keeps its buffers. That of torch 2.11 closes them after its first save."""
    stager = DefaultStager(StagingOptions(False, False, False, False))
    try:
        for _ in range(2):
            stager.stage({"model": nn.Linear(1, 1).state_dict()})
    except KeyError:
        return False
    finally:
        stager.close()
    return True


class TunedDcp(Dcp):
    """`async_save` with pinned staging buffers, which are kept where torch can do that."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        super().__init__(model, folder, "tuned")
        self._is_kept = can_stage_twice()
        self._stager = self._new_stager()

    def _new_stager(self) -> DefaultStager:
        return DefaultStager(StagingOptions(ON_CUDA, False, False, ON_CUDA))

    def settle(self) -> None:
        super().settle()
        if not self._is_kept:
            self._stager.close()
            self._stager = self._new_stager()


def finish() -> None:
    if ON_CUDA:
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], Any]) -> float:
    finish()
    started = time.perf_counter()
    call()
    finish()
    return time.perf_counter() - started

"""The random number generators of this process: Python's, NumPy's if it is imported, torch's on CPU and CUDA."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

from keepbest.capture.per_rank import PerRank


class RandomState(PerRank):
    """The random number generators of each rank as a training state.

    `BestKeeper(..., training_state={"random": RandomState()})` keeps the states of Python's generator, of NumPy's if it
    is imported, and of torch's on the CPU and the current CUDA device, of every rank.
    `load(..., training_state={"random": RandomState()})` sets them. A rank that did not exist when they were saved
    keeps its own, with a warning.
    """

    def __init__(self) -> None:
        super().__init__(_Generators())


def seed_random_state(seed: int) -> None:
    """Seed all generators. **Rank-local**."""
    random.seed(seed)
    torch.manual_seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed % 2**32)


def read_random_state() -> dict[str, Any]:
    """Return the state of all generators, in plain types and tensors that `torch.load` reads with `weights_only`.

    **Rank-local**.
    """
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if numpy := sys.modules.get("numpy"):
        kind, keys, *rest = numpy.random.get_state()
        state["numpy"] = (kind, keys.tolist(), *rest)
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Continue from what `read_random_state` returned. **Rank-local**."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "numpy" in state and (numpy := sys.modules.get("numpy")):
        numpy.random.set_state(state["numpy"])


class _Generators:
    """The generators of this process, with the methods of a training state."""

    def state_dict(self) -> dict[str, Any]:
        return read_random_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        restore_random_state(state_dict)

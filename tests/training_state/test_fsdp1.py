"""Optimizers of FSDP1 units, with the parameters of the user and with flat ones."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from tests.kit.pool import run_ranks
from tests.kit.strategies import fsdp1
from tests.training_state.loop import Training, differing
from tests.training_state.test_continue import OPTIMIZERS, SETTINGS


def trainable(model: nn.Module) -> nn.Module:
    """Without original parameters, a unit is frozen as a whole or not."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def flat(model: nn.Module) -> nn.Module:
    return fsdp1(trainable(model), use_orig_params=False)


def flat_blocks(model: nn.Module) -> nn.Module:
    trainable(model).module = fsdp1(model.module, use_orig_params=False)
    return fsdp1(model, use_orig_params=False)


def blocks(model: nn.Module) -> nn.Module:
    model.module = fsdp1(model.module)
    return fsdp1(model)


def partly(model: nn.Module) -> nn.Module:
    """Beside the unit are parameters that every rank has whole."""
    model.module = fsdp1(model.module)
    return model


def plain_and_trainable(model: nn.Module) -> nn.Module:
    return trainable(model)


WRAPS = {"orig": fsdp1, "blocks": blocks, "flat": flat, "flat blocks": flat_blocks, "partly": partly}


def digest(training):
    """All that there is, as torch itself brings it to rank 0. Collective."""
    with FullyShardedDataParallel.summon_full_params(training.model, writeback=False):
        weights = {name: each.tolist() for name, each in training.model.named_parameters()}
    state = FullyShardedDataParallel.optim_state_dict(training.model, training.optimizer)
    found = {
        f"{name}/{key}": value.tolist() if isinstance(value, torch.Tensor) else value
        for name, values in state["state"].items()
        for key, value in values.items()
    }
    return {**weights, **found, "groups": str(state["param_groups"])}


def continue_all(directory, cases):
    """What differs after a resume in each case."""
    found = {}
    for wrap, name, settings in cases:
        folder = directory / str(len(found))
        training, again = (Training(WRAPS[wrap], OPTIMIZERS[name], seed=seed) for seed in (1, 2))
        for each in (training, again):
            each.everything = partial(digest, each)
        uninterrupted = training.keep(folder, **settings)
        found[wrap, name, str(settings)] = differing(again.resume(folder), uninterrupted)
    return {case: wrong for case, wrong in found.items() if wrong}


CASES = [
    ("orig", "adamw", {}),
    ("orig", "sgd", SETTINGS[1]),
    ("orig", "adamw", SETTINGS[-1]),
    ("blocks", "groups", SETTINGS[2]),
    ("blocks", "adamw", SETTINGS[3]),
    ("flat", "adamw", {}),
    ("flat", "sgd", SETTINGS[-1]),
    ("flat blocks", "adamw", SETTINGS[1]),
    ("flat blocks", "adamw", SETTINGS[3]),
]


@pytest.mark.parametrize("world_size", [2, 3])
def test_fsdp1_training_continues_from_the_best(world_size, tmp_path):
    cases = CASES if world_size == 2 else CASES[2:6:3]
    for found in run_ranks(continue_all, world_size, tmp_path, cases):
        assert found == {}

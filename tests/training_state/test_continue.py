"""A run that continues from the best equals, bit for bit, the one that was never interrupted."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, OneCycleLR, SequentialLR

from tests.kit.pool import run_ranks
from tests.kit.strategies import ddp, single
from tests.training_state.loop import Training, differing


def grouped(model, *, reverse=False):
    """Groups with options of their own, in one of two orders."""
    weights = [each for each in model.parameters() if each.dim() > 1]
    rest = [each for each in model.parameters() if each.dim() <= 1]
    groups = [{"params": weights, "lr": 0.03, "weight_decay": 0.1}, {"params": rest, "lr": 0.2}]
    return torch.optim.AdamW(groups[::-1] if reverse else groups)


def of(kind, **options):
    return lambda model: kind(model.parameters(), **options)


OPTIMIZERS = {
    "sgd": of(torch.optim.SGD, lr=0.1, momentum=0.9),
    "sgd without state": of(torch.optim.SGD, lr=0.1),
    "adamw": of(torch.optim.AdamW, lr=0.05, amsgrad=True),
    "adamw foreach": of(torch.optim.AdamW, lr=0.05, foreach=True, amsgrad=True),
    "adamw fused": of(torch.optim.AdamW, lr=0.05, fused=True),
    "tensor lr": lambda model: torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.05), foreach=False),
    "names": lambda model: torch.optim.Adam(model.named_parameters(), lr=0.05),
    "groups": grouped,
    "adafactor": of(torch.optim.Adafactor, lr=0.05),
    "lbfgs": of(torch.optim.LBFGS, lr=0.05, max_iter=3),
}
SETTINGS = [
    {},
    {"async_save": True},
    {"format": "safetensors"},
    {"format": "dcp"},
    {"format": "dcp", "async_save": True},
]


def continue_all(directory, wrap, optimizers):
    """What differs after a resume, for each optimizer and each way to save."""
    found = {}
    for name, settings in ((name, settings) for name in optimizers for settings in SETTINGS):
        make, folder = OPTIMIZERS[name], directory / f"{name}{len(found)}"
        uninterrupted = Training(wrap, make).keep(folder, **settings)
        again = Training(wrap, partial(grouped, reverse=True) if make is grouped else make, seed=2)
        found[name, str(settings)] = differing(again.resume(folder), uninterrupted)
    return found


def by_columns(model):
    """With weights that lie in memory column by column, as a state of them does."""
    for linear in (model.module, model.second):
        linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t())
    return model


def test_fused_optimizer_continues_with_weights_in_any_order(tmp_path):
    # It goes through the memory of a weight and of its state side by side.
    found = continue_all(tmp_path, by_columns, ["adamw fused"])
    assert {case: wrong for case, wrong in found.items() if wrong} == {}


def test_plain_training_continues_from_the_best(tmp_path, request):
    optimizers = list(OPTIMIZERS)[:: 4 if request.config.getoption("--quick") else 1]
    assert {case: wrong for case, wrong in continue_all(tmp_path, single, optimizers).items() if wrong} == {}


@pytest.mark.parametrize("world_size", [2, 3])
def test_ddp_training_continues_from_the_best(world_size, tmp_path):
    optimizers = ["sgd", "adamw fused", "groups", "lbfgs"] if world_size == 2 else ["groups"]
    for found in run_ranks(continue_all, world_size, tmp_path, ddp, optimizers):
        assert {case: wrong for case, wrong in found.items() if wrong} == {}


SCHEDULERS = {
    "steps": lambda optimizer: MultiStepLR(optimizer, [1, 3]),
    "cycle": lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=9),
    "several": lambda optimizer: SequentialLR(
        optimizer, [LinearLR(optimizer, total_iters=2), CosineAnnealingLR(optimizer, 5)], [3]
    ),
}


@pytest.mark.parametrize("kind", ["torch", "dcp"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_scheduler_continues_from_the_best(scheduler, kind, tmp_path):
    others = {"scheduler": SCHEDULERS[scheduler], "scaler": lambda _: torch.amp.GradScaler("cpu")}
    make = OPTIMIZERS["adamw foreach"]
    uninterrupted = Training(single, make, others=others).keep(tmp_path, format=kind, async_save=True)
    assert differing(Training(single, make, seed=2, others=others).resume(tmp_path), uninterrupted) == []

"""Tensors that their module brings to the shape that was saved load as torch loads them. Others are refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.ao.quantization import FakeQuantize, HistogramObserver, MovingAveragePerChannelMinMaxObserver

from keepbest import BestKeeper, TrainingIteration, load
from keepbest.errors import SnapshotError
from tests.kit.models import filled, same
from tests.kit.pool import run_ranks
from tests.kit.strategies import compiled, ddp, single

REF = "best_model.loss"
FORMATS = ["torch", "safetensors", "dcp"]


class Bank(nn.Module):
    """Keeps what it has seen."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bank", torch.zeros(0, 4))
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        self.bank = torch.cat([self.bank, x.detach()])
        return self.layer(x)

    def _load_from_state_dict(self, state, prefix, *others):
        if prefix + "bank" in state:
            self.bank = torch.zeros_like(state[prefix + "bank"])
        super()._load_from_state_dict(state, prefix, *others)


class Growing(nn.Embedding):
    """Has as many rows as what it is loaded from."""

    def _load_from_state_dict(self, state, prefix, *others):
        self.weight = nn.Parameter(torch.zeros_like(state[prefix + "weight"]))
        super()._load_from_state_dict(state, prefix, *others)


class Checking(nn.Linear):
    """Has an override that changes no shape."""

    def _load_from_state_dict(self, state, *others):
        super()._load_from_state_dict(state, *others)


def observed():
    per_channel = MovingAveragePerChannelMinMaxObserver
    return nn.ModuleDict({
        "layer": nn.Linear(4, 4),
        "of_weights": FakeQuantize(observer=per_channel, qscheme=torch.per_channel_affine, dtype=torch.qint8),
        "of_outputs": HistogramObserver(bins=8),
    })  # fmt: skip


def use(model, x):
    if isinstance(model, Bank):
        model(x)
        return
    model["of_weights"](x)
    model["of_outputs"](x)


MAKE = {"bank": Bank, "observers": observed}


def keep(directory, model, file_format="torch", **settings):
    with BestKeeper(model, directory=directory, metric_key="loss", format=file_format, **settings) as keeper:
        keeper.observe(1.0, TrainingIteration(update=1))


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("kind", list(MAKE))
@pytest.mark.parametrize("wrap", [single, compiled])
def test_resized_tensors_load_as_torch_loads_them(kind, file_format, wrap, tmp_path):
    model, target, by_torch = (MAKE[kind]() for _ in range(3))
    use(model, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    keep(tmp_path, wrap(model), file_format)
    by_torch.load_state_dict(model.state_dict())
    load(tmp_path, REF, wrap(target))
    assert same(target.state_dict(), by_torch.state_dict())


def load_bank(directory, file_format):
    model = filled(Bank(), 0)
    use(model, torch.ones(3, 4))
    keep(directory, ddp(model), file_format)
    wrapped = ddp(target := Bank())
    if dist.get_rank() == 1:
        use(target, torch.zeros(5, 4))  # on each rank another shape
    load(directory, REF, wrapped)
    return target.bank.tolist(), same(dict(target.layer.state_dict()), dict(model.layer.state_dict()))


@pytest.mark.parametrize("file_format", FORMATS)
def test_every_rank_gets_the_shape_that_was_saved(file_format, tmp_path):
    assert run_ranks(load_bank, 2, tmp_path, file_format) == [([[1.0] * 4] * 3, True)] * 2


def test_parameter_that_grows_loads_in_a_part(tmp_path):
    saved = nn.ModuleDict({"words": Growing(7, 2), "rest": nn.Linear(2, 2)})
    keep(tmp_path, saved, model_names=["words"])
    load(tmp_path, REF, target := nn.ModuleDict({"words": Growing(5, 2), "rest": nn.Linear(2, 2)}))
    assert torch.equal(target["words"].weight, saved["words"].weight)


@pytest.mark.parametrize(
    ("saved", "target", "names"),
    [
        (nn.BatchNorm1d(3), nn.BatchNorm1d(4), "0.bias, 0.running_mean, 0.running_var, 0.weight"),
        (Checking(3, 2), Checking(3, 4), "0.bias, 0.weight"),
    ],
)
def test_override_that_changes_no_shape_is_refused_before(saved, target, names, tmp_path):
    keep(tmp_path, nn.Sequential(saved, nn.Linear(2, 2)))
    model = nn.Sequential(target, nn.Linear(2, 2))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SnapshotError, match=rf"shapes differ for {names}\. Nothing was loaded"):
        load(tmp_path, REF, model)
    assert same(model.state_dict(), before)


def test_bank_is_untouched_where_something_else_does_not_fit(tmp_path):
    saved = nn.ModuleDict({"bank": Bank(), "rest": nn.Linear(2, 2)})
    use(saved["bank"], torch.ones(3, 4))
    keep(tmp_path, saved)
    target = nn.ModuleDict({"bank": Bank(), "rest": nn.Linear(2, 3)})
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(SnapshotError, match=r"shapes differ for rest\.bias, rest\.weight\. Nothing was loaded"):
        load(tmp_path, REF, target)
    assert same(target.state_dict(), before)

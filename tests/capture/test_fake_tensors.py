"""Tensors of `FakeTensorMode` have no values: they are refused in words of ours, and so is the mode."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from keepbest import BestKeeper, load
from keepbest.errors import ConfigError, MetricError
from tests.kit.runs import Run, saved_at, set_weights, update

BEST = "best_model.loss"
FORMATS = ["torch", "safetensors", "dcp"]
MODE = "a mode of torch is on, such as FakeTensorMode, in which each new tensor is a FakeTensor"


def fake_linear():
    with FakeTensorMode():
        return nn.Linear(1, 1)


@pytest.mark.parametrize("kind", FORMATS)
def test_fake_weights_are_refused_at_start(kind, tmp_path):
    keeper = BestKeeper(fake_linear(), directory=tmp_path, metric_key="loss", format=kind)
    with pytest.raises(ConfigError, match="'weight' is a FakeTensor, which has no values that could be saved"):
        keeper.start()


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("kind", FORMATS)
def test_nothing_is_saved_where_copies_have_no_values(kind, is_async, tmp_path):
    run = Run(tmp_path, format=kind, async_save=is_async)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ConfigError, match=MODE):
        run.keeper.start()
    with run.keeper as keeper:
        run.observe(3.0)
        with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ConfigError, match=MODE):
            keeper.observe(2.0, update(2))
        with torch.device("meta"):  # a mode in which nothing is lost
            assert keeper.observe(1.0, update(3)).is_new_best
    assert load(tmp_path, BEST, nn.Linear(1, 1)).iteration == update(3)


def test_weights_that_become_fake_are_refused_when_saved(tmp_path):
    run = Run(tmp_path)
    with run.keeper as keeper:
        run.observe(3.0)
        weight = run.model.weight
        run.model.weight = fake_linear().weight
        with pytest.raises(ConfigError, match="'weight' is a FakeTensor"):
            keeper.observe(2.0, update(2))
        run.model.weight = weight
        run.observe(1.0, first=3)
    assert saved_at(tmp_path, BEST) == 3


def test_fake_state_of_an_optimizer_is_refused_at_start(tmp_path):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model.weight] = {"momentum_buffer": fake_linear().weight.detach()}
    keeper = BestKeeper(model, directory=tmp_path, metric_key="loss", training_state={"it": optimizer})
    with pytest.raises(ConfigError, match="'weight/momentum_buffer of it' is a FakeTensor"):
        keeper.start()


def test_fake_value_is_named_as_such(tmp_path):
    with FakeTensorMode():
        value = torch.ones(())
    with Run(tmp_path).keeper as keeper, pytest.raises(MetricError, match="of FakeTensorMode"):
        keeper.observe(value, update(1))


def test_nothing_is_loaded_in_the_mode(tmp_path):
    run = Run(tmp_path)
    with run.keeper:
        run.observe(1.0)
    model = nn.Linear(1, 1)
    set_weights(model, 7.0)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ConfigError, match=MODE):
        load(tmp_path, BEST, model)
    assert model.weight.item() == 7.0

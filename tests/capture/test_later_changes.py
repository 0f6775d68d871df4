"""What changes in a model between two bests is in the second, though its state dict is not asked for each time."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn

from keepbest import BestKeeper
from keepbest.errors import ConfigError
from tests.capture.test_strategies import read_files
from tests.kit.changes import (
    CHANGES,
    class_with_extra_state,
    make_complex,
    model_of,
    swap_in_a_nested_tensor,
    swap_in_a_sparse_tensor,
    swap_in_a_subclass,
)
from tests.kit.runs import update

MODES = [("torch", False), ("torch", True), ("safetensors", True), ("dcp", True)]
NOT_KEPT = {
    ("safetensors", swap_in_a_sparse_tensor),
    ("dcp", swap_in_a_sparse_tensor),
    ("safetensors", make_complex),
    ("safetensors", class_with_extra_state),
    ("dcp", class_with_extra_state),  # it has a file of its own
}


def state_of(model):
    return {key: values_of(value) for key, value in model.state_dict().items()}


def values_of(value):
    return copy.deepcopy(value.to_dense() if isinstance(value, torch.Tensor) and value.is_sparse else value)


def assert_holds(keeper, expected, file_format):
    keeper.flush()
    state = read_files(keeper.best_path, file_format)["model"]
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert state[key].dtype == value.dtype, key
            assert torch.equal(values_of(state[key]), value), key
        else:
            assert state[key] == value, key


def spoil(model):
    """Training continues while the snapshot is written."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if 0 not in tensor.stride():
                tensor.zero_()


def keeper_of(model, directory, file_format, in_background):
    return BestKeeper(model, directory=directory, metric_key="loss", format=file_format, async_save=in_background)


def bests_after(change, directory, file_format, in_background):
    """A keeper after each best that follows a change, and what the best must hold."""
    model = model_of()
    with keeper_of(model, directory, file_format, in_background) as keeper:
        keeper.observe(0.0, update(1))
        change(model)
        for number in (2, 3):
            expected = state_of(model)
            keeper.observe(-number, update(number))
            spoil(model)
            yield keeper, expected


@pytest.mark.parametrize("change", [change for change in CHANGES if change is not swap_in_a_subclass])
def test_change_between_two_bests_is_in_the_second(change, tmp_path, request):
    for file_format, in_background in MODES[1:2] if request.config.getoption("--quick") else MODES:
        if (file_format, change) in NOT_KEPT:
            continue
        for keeper, expected in bests_after(
            change, tmp_path / f"{file_format}-{in_background}", file_format, in_background
        ):
            assert_holds(keeper, expected, file_format)


@pytest.mark.parametrize(
    ("change", "reason"), [(swap_in_a_subclass, "a subclass of Tensor"), (swap_in_a_nested_tensor, "nested")]
)
@pytest.mark.parametrize(("file_format", "in_background"), MODES)
def test_kind_of_tensor_that_comes_later_is_refused(change, reason, file_format, in_background, tmp_path):
    model = model_of()
    with keeper_of(model, tmp_path, file_format, in_background) as keeper:
        keeper.observe(1.0, update(1))
        change(model)
        with pytest.raises(ConfigError, match=f"'first.weight' is .*{reason}"):
            keeper.observe(0.0, update(2))


class Bare(nn.Module):
    """A weight that, as a buffer, would have the same place among all names."""

    def __init__(self):
        super().__init__()
        self.weight, self.last = nn.Parameter(torch.ones(2), requires_grad=False), nn.Linear(2, 2)


def freeze(model):
    model.first.weight.requires_grad_(False)


def freeze_by_swapping(model):
    torch.utils.swap_tensors(model.first.weight, nn.Parameter(torch.randn(4, 4), requires_grad=False))


@pytest.mark.parametrize("change", [freeze, freeze_by_swapping])
def test_weight_that_is_frozen_later_is_left_out(change, tmp_path):
    model = model_of()
    with BestKeeper(model, directory=tmp_path, metric_key="loss", save_frozen_weights=False) as keeper:
        keeper.observe(3.0, update(1))
        change(model)
        keeper.observe(2.0, update(2))
        frozen = torch.load(keeper.best_path / "model.pt")
        model.first.weight.requires_grad_(True)
        keeper.observe(1.0, update(3))
        thawed = torch.load(keeper.best_path / "model.pt")
    assert model.state_dict().keys() - frozen.keys() == {"first.weight"}
    assert model.state_dict().keys() == thawed.keys()


def test_frozen_weight_that_becomes_a_buffer_is_kept(tmp_path):
    model = Bare()
    with BestKeeper(model, directory=tmp_path, metric_key="loss", save_frozen_weights=False) as keeper:
        keeper.observe(2.0, update(1))
        weight = model.weight
        del model.weight
        model.register_buffer("weight", weight)
        keeper.observe(1.0, update(2))
        state = torch.load(keeper.best_path / "model.pt")
    assert state.keys() == model.state_dict().keys()


def test_submodel_that_is_removed_later_is_refused(tmp_path):
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
    with BestKeeper(model, directory=tmp_path, metric_key="loss", model_names=["encoder", "head"]) as keeper:
        keeper.observe(2.0, update(1))
        head = model.pop("head")
        with pytest.raises(ConfigError, match="the model has no submodel 'head' any more"):
            keeper.observe(1.0, update(2))
        model["head"] = head
        assert keeper.observe(1.0, update(3)).is_new_best


def test_parts_that_overlap_have_what_changed(tmp_path):
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "head": nn.Linear(2, 2)})
    names = {"all": None, "body": ["body"], "both": ["body.1", "head"]}
    keepers = {
        name: BestKeeper(model, directory=tmp_path, metric_key="loss", id=name, model_names=each)
        for name, each in names.items()
    }
    for number, change in enumerate((lambda: None, lambda: tie_head(model), lambda: replace_body(model)), start=1):
        change()
        for name, keeper in keepers.items():
            keeper.observe(-number, update(number))
            for part, state in read_files(keeper.best_path, "torch").items():
                expected = model.get_submodule("" if part == "model" else part).state_dict()
                assert state.keys() == expected.keys(), name
                assert all(torch.equal(state[key], value) for key, value in expected.items()), name
    for keeper in keepers.values():
        keeper.close()


def tie_head(model):
    model["head"].weight = model["body"][1].weight


def replace_body(model):
    model["body"] = nn.Sequential(model["body"][1], nn.Linear(2, 3))


def test_weights_that_were_replaced_are_freed_at_the_end(tmp_path):
    model = model_of()
    keeper = BestKeeper(model, directory=tmp_path, metric_key="loss")
    keeper.observe(1.0, update(1))
    replaced = weakref.ref(model.first.weight)
    model.first = nn.Linear(4, 4)
    keeper.close()
    assert replaced() is None

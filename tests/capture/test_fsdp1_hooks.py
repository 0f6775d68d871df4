"""State dicts of modules around, and beside, the units of FSDP1, which it alone can call."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from keepbest import BestKeeper, load
from keepbest.errors import ConfigError, RankFailedError
from tests.capture.test_restore import REF, keep
from tests.kit.pool import run_ranks
from tests.kit.runs import set_weights
from tests.kit.strategies import CPU, whole_weights


class StateOnRank0(nn.Linear):
    def get_extra_state(self):
        if dist.is_initialized() and dist.get_rank() > 0:
            raise ValueError("no state here")
        return [1]

    def set_extra_state(self, state):
        self.state = state


def load_where_a_module_fails(directory):
    model = FullyShardedDataParallel(nn.Sequential(nn.Linear(2, 2), StateOnRank0(2, 2)), device_id=CPU)
    with pytest.raises(RankFailedError) as caught:
        load(directory, REF, model, rank_timeout=20)
    return str(caught.value)


def test_failure_beside_units_of_fsdp1_is_raised_on_every_rank(tmp_path):
    keep(nn.Sequential(nn.Linear(2, 2), StateOnRank0(2, 2)), tmp_path)
    for message in run_ranks(load_where_a_module_fails, 2, tmp_path):
        assert "failed to find the saved parts in the model on rank 1 of 2: ValueError: no state here" in message


class Renaming(nn.Module):
    """Renames one layer in its state dict, leaves out another, and adds a tensor."""

    def __init__(self, value):
        super().__init__()
        self.unit, self.layer, self.unsaved = nn.Linear(2, 2), nn.Linear(2, 2, bias=False), nn.Linear(2, 2)
        self.tied = nn.ModuleDict({"unsaved": self.unsaved})
        set_weights(self, value)
        self._register_state_dict_hook(self.rename)
        self._register_load_state_dict_pre_hook(self.rename_back)

    @staticmethod
    def rename(_module, state, prefix, _metadata):
        state[f"{prefix}renamed"] = state.pop(f"{prefix}layer.weight")
        state[f"{prefix}added"] = torch.ones(3)
        for key in [key for key in state if "unsaved" in key]:
            del state[key]

    @staticmethod
    def rename_back(state, prefix, *_others):
        state[f"{prefix}layer.weight"] = state.pop(f"{prefix}renamed")
        state.pop(f"{prefix}added", None)


def keep_and_load_renamed(directory, file_format):
    models = [Renaming(3.0), Renaming(4.0)]
    for model in models:
        model.unit = FullyShardedDataParallel(model.unit, device_id=CPU)
    keep(models[0], directory, file_format)
    found = load(directory, REF, models[1], rank_timeout=20)
    return sorted(found.keys), models[1].layer.weight.flatten().tolist(), models[1].unsaved.bias.tolist()


@pytest.mark.parametrize("file_format", ["torch", "safetensors", "dcp"])
def test_hooks_beside_units_of_fsdp1_may_rename_and_leave_out(file_format, tmp_path):
    expected = ["added", "renamed", "unit.bias", "unit.weight"], [3.0] * 4, [4.0] * 2
    assert run_ranks(keep_and_load_renamed, 2, tmp_path, file_format) == [expected] * 2


def scale(_module, state, *_others):
    for key in [key for key in state if key.endswith("weight")]:
        state[key] = state[key] * 10


def model_with_a_hook(hook, place):
    unit = FullyShardedDataParallel(nn.Linear(2, 2), device_id=CPU, use_orig_params=True)
    model = nn.ModuleDict({"unit": unit})
    (unit if place == "on" else model)._register_state_dict_hook(hook)
    return model


def keep_scaled_unit(directory, place):
    with pytest.raises(ConfigError, match="is changed by a hook or override"):
        BestKeeper(model_with_a_hook(scale, place), directory=directory, metric_key="loss").start()


@pytest.mark.parametrize("place", ["on", "around"])
def test_hook_at_a_unit_of_fsdp1_that_changes_it_is_refused(place, tmp_path):
    run_ranks(keep_scaled_unit, 2, tmp_path, place)


def move(_module, state, *_others):
    state.update({key: value.cpu().contiguous() for key, value in state.items()})


def keep_and_load_moved(directory):
    models = [model_with_a_hook(move, "around") for _ in range(2)]
    keep(models[0], directory)
    load(directory, REF, models[1], rank_timeout=20)
    weights = [whole_weights(model) for model in models]
    return all(map(torch.equal, *weights))


def test_hook_around_a_unit_of_fsdp1_may_copy_it(tmp_path):
    assert run_ranks(keep_and_load_moved, 2, tmp_path) == [True] * 2


def add_a_hook_on_rank_1(directory):
    model = nn.ModuleDict({"unit": FullyShardedDataParallel(nn.Linear(2, 2), device_id=CPU, use_orig_params=True)})
    if dist.get_rank() == 1:
        model._register_state_dict_hook(lambda *_: None)
    keep(model, directory)
    return "kept"


def test_hook_around_a_unit_of_fsdp1_on_one_rank_hangs_nobody(tmp_path):
    assert run_ranks(add_a_hook_on_rank_1, 2, tmp_path) == ["kept"] * 2

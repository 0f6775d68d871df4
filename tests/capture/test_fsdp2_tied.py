"""Tied weights in units of FSDP2, which an evaluation has left whole, and in another dtype."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from keepbest import BestKeeper, load
from tests.capture.test_strategies import read_files
from tests.kit.models import same_bits
from tests.kit.pool import run_ranks
from tests.kit.runs import update

HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16)


class Language(nn.Module):
    """Its head has the weight of its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, batch):
        return self.head(torch.tanh(self.body(self.embedding(batch))))


class WithOwnStateDict(Language):
    """Lists its weights itself, so that no hook of torch runs."""

    def state_dict(self, *_args, destination=None, prefix="", **_kwargs):
        state = {} if destination is None else destination
        state.update((prefix + name, value) for name, value in self.named_parameters(remove_duplicate=False))
        return state


def whole(model):
    """torch takes the weight for one of the embedding: the head has it because they are tied."""
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), mp_policy=HALF)


def head_first(model):
    """torch takes the weight for one of the head, which comes after the embedding in a state dict."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard([model.head, model.embedding], mesh=mesh, mp_policy=HALF, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh, mp_policy=HALF)


def evaluated(wrap, kind, seed):
    torch.manual_seed(seed)
    model = wrap(kind())
    with torch.no_grad():
        model(torch.arange(9))
    assert model.head.weight.dtype == torch.bfloat16
    return model


def keep_and_load(directory, wrap, kind, model_names, settings):
    """The weight that was kept, that of the model then, and that of another one after a load."""
    model, other = evaluated(wrap, kind, 0), evaluated(wrap, kind, 1)
    with BestKeeper(model, directory=directory, metric_key="loss", model_names=model_names, **settings) as keeper:
        model(torch.arange(9)).sum().backward()  # which frees what is whole
        with torch.no_grad():
            model(torch.arange(9))
        keeper.observe(1.0, update(1))
    load(directory, "best_model.loss", other, only=model_names)
    weights = []
    for each in (model, other):
        for module in (each, each.head):
            if hasattr(module, "reshard"):
                module.reshard()
        weights.append(each.embedding.weight.full_tensor().detach())
    if dist.get_rank() == 0:
        state = read_files(keeper.best_path, settings["format"])
        weights.append(state["head"]["weight"] if model_names else state["model"]["embedding.weight"])
    return weights


@pytest.mark.parametrize("settings", [{"format": "torch"}, {"format": "dcp"}, {"format": "torch", "async_save": True}])
@pytest.mark.parametrize(
    ("wrap", "kind", "model_names"),
    [(whole, Language, ["head"]), (head_first, Language, None), (whole, WithOwnStateDict, None)],
)
def test_tied_weight_left_whole_is_kept_and_loaded(wrap, kind, model_names, settings, tmp_path):
    for now, loaded, *kept in run_ranks(keep_and_load, 2, tmp_path, wrap, kind, model_names, settings):
        assert all(same_bits(each, now) for each in (loaded, *kept))

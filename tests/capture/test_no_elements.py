"""Weights that have no elements are kept, and loaded, in every layout."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from keepbest import BestKeeper, load
from tests.capture.test_strategies import read_files
from tests.kit.pool import run_ranks
from tests.kit.runs import set_weights, update

SHAPES = {"no_rows": (0, 4), "no_columns": (4, 0), "nothing": (0,)}


def sharded(mesh, value):
    model = nn.Linear(4, 3)
    set_weights(model, value)
    for name, shape in SHAPES.items():
        model.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    return fully_shard(model, mesh=mesh)


def keep_and_load(directory, file_format, is_alone):
    # Over a part of a mesh shards are put together by torch, and over all ranks by what they send.
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards"))["shards"]
    mesh = mesh if is_alone else init_device_mesh("cpu", (2,))
    with BestKeeper(sharded(mesh, 1.0), directory=directory, metric_key="loss", format=file_format) as keeper:
        keeper.observe(1.0, update(1))
    model = sharded(mesh, 2.0)
    load(directory, "best_model.loss", model)
    [state] = read_files(keeper.best_path, file_format).values()
    return {name: tuple(value.shape) for name, value in state.items()}, model.weight.full_tensor().unique().tolist()


@pytest.mark.parametrize("file_format", ["torch", "safetensors", "dcp"])
@pytest.mark.parametrize("is_alone", [False, True])
def test_weights_without_elements_are_kept_and_loaded(file_format, is_alone, tmp_path):
    for shapes, values in run_ranks(keep_and_load, 2, tmp_path, file_format, is_alone):
        assert shapes == {"weight": (3, 4), "bias": (3,), **SHAPES}
        assert values == [1.0]

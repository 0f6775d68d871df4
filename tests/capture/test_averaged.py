"""An averaged model is kept as the model that it averages."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from keepbest import BestKeeper, load
from tests.kit.pool import run_ranks
from tests.kit.runs import update


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def train_and_keep(directory, wrap, file_format):
    model = wrap(network())
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with BestKeeper(averaged, directory=directory, metric_key="loss", format=file_format) as keeper:
        for number in range(1, 4):
            optimizer.zero_grad()
            model(torch.ones(8, 3) * number).square().mean().backward()
            optimizer.step()
            averaged.update_parameters(model)
            keeper.observe(-float(number), update(number))
        expected = {key.removeprefix("module."): value for key, value in averaged.module.state_dict().items()}
        again = AveragedModel(model)
        load(directory, "best_model.loss", again)
        return expected, {key.removeprefix("module."): value for key, value in again.module.state_dict().items()}


def plain(model):
    return model


def ddp(model):
    return DistributedDataParallel(model)


@pytest.mark.parametrize("file_format", ["torch", "dcp"])
@pytest.mark.parametrize(("wrap", "world_size"), [(plain, 1), (ddp, 2)])
def test_averaged_weights_have_plain_names_and_load(wrap, world_size, file_format, tmp_path):
    for expected, again in run_ranks(train_and_keep, world_size, tmp_path, wrap, file_format):
        assert expected.keys() == again.keys() == network().state_dict().keys()
        assert all(torch.equal(again[key], value) for key, value in expected.items())
        model = network()
        load(tmp_path, "best_model.loss", model)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in expected.items())


def keep_and_load_sharded(directory, file_format):
    def average():
        averaged = AveragedModel(network())
        averaged.module = FullyShardedDataParallel(averaged.module, device_id=torch.device("cpu"))
        return averaged

    averaged, again = average(), average()
    with torch.no_grad():
        for parameter in averaged.parameters():
            parameter.add_(1.0)
    with BestKeeper(averaged, directory=directory, metric_key="loss", format=file_format) as keeper:
        keeper.observe(1.0, update(1))
    load(directory, "best_model.loss", again)
    with (
        FullyShardedDataParallel.summon_full_params(averaged.module),  # shards have padding, which is not kept
        FullyShardedDataParallel.summon_full_params(again.module),
    ):
        return [torch.equal(one, other) for one, other in zip(averaged.parameters(), again.parameters(), strict=True)]


@pytest.mark.parametrize("file_format", ["torch", "dcp"])
def test_average_of_units_of_fsdp1_is_kept_under_plain_names(file_format, tmp_path):
    equal = run_ranks(keep_and_load_sharded, 2, tmp_path, file_format)
    assert equal == [[True] * len(equal[0])] * 2
    assert equal[0]
    model = network()
    load(tmp_path, "best_model.loss", model)
    assert torch.equal(model[0].weight, network()[0].weight + 1.0)

"""A weight whose memory was freed is an error that names it, and not the end of the process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from keepbest import BestKeeper, load
from keepbest.errors import ConfigError, SnapshotError
from tests.kit.pool import run_ranks
from tests.kit.runs import update

FORMATS = ["torch", "safetensors", "dcp"]
EVERY_FORMAT = pytest.mark.parametrize("file_format", FORMATS)


class Stateful(nn.Linear):
    def get_extra_state(self):
        return {"table": self.table}

    def set_extra_state(self, state):
        self.table = state["table"]


def layers():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


def free(tensor):
    tensor.untyped_storage().resize_(0)


def free_a_part(tensor):
    tensor.data = torch.ones(40)[4:20].view(tensor.shape)
    tensor.untyped_storage().resize_(79)  # of 80 bytes


def free_in_another_order(tensor):
    tensor.data = torch.ones(4, 4).t()
    tensor.untyped_storage().resize_(60)


@EVERY_FORMAT
@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("take_away", [free, free_a_part, free_in_another_order])
def test_freed_weight_is_refused_at_the_next_best(take_away, in_background, file_format, tmp_path):
    model = layers()
    keeper = BestKeeper(model, directory=tmp_path, metric_key="loss", format=file_format, async_save=in_background)
    with keeper:
        keeper.observe(2.0, update(1))
        take_away(model[0].weight)
        with pytest.raises(ConfigError, match=r"'0\.weight' has no values: its storage has \d+ bytes, too few for 16 "):
            keeper.observe(1.0, update(2))
        model[0].weight.data = torch.ones(4, 4)
        assert keeper.observe(0.5, update(3)).is_new_best


@EVERY_FORMAT
def test_freed_buffer_is_refused_at_start(file_format, tmp_path):
    model = layers()
    free(model[1].running_mean)
    keeper = BestKeeper(model, directory=tmp_path / "run", metric_key="loss", format=file_format)
    with pytest.raises(ConfigError, match=r"'1\.running_mean' has no values: its storage has 0 bytes"):
        keeper.start()
    assert not (tmp_path / "run").exists()


def test_freed_tensor_in_an_extra_state_is_refused(tmp_path):
    model = Stateful(2, 2)
    model.table = torch.ones(3)
    with BestKeeper(model, directory=tmp_path, metric_key="loss") as keeper:
        keeper.observe(2.0, update(1))
        free(model.table)
        with pytest.raises(ConfigError, match=r"holds a tensor at \['table'\] that has no values: its storage has 0 "):
            keeper.observe(1.0, update(2))


def test_weight_that_is_freed_between_two_keepers_is_refused(tmp_path):
    model = layers()
    first, second = (BestKeeper(model, directory=tmp_path, metric_key="loss", id=name) for name in ("one", "two"))
    with first, second:
        first.start()
        second.start()
        first.observe(1.0, update(1))
        free(model[0].weight)
        with pytest.raises(ConfigError, match=r"'0\.weight' has no values"):
            second.observe(1.0, update(1))


def free_state_of_an_optimizer(directory):
    model = nn.Linear(4, 4)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    with BestKeeper(model, directory=directory, metric_key="loss", training_state={"optimizer": optimizer}) as keeper:
        keeper.observe(2.0, update(1))
        if dist.get_rank() == 1:
            free(optimizer.state[model.weight]["exp_avg"])
        with pytest.raises(ConfigError, match=r"rank 1 of 2: ConfigError: '.*weight.*exp_avg.*' has no values"):
            keeper.observe(1.0, update(2))


def free_on_one_rank(directory):
    model = layers()
    with BestKeeper(model, directory=directory, metric_key="loss") as keeper:
        keeper.observe(2.0, update(1))
        if dist.get_rank() == 1:
            free(model[0].bias)
        with pytest.raises(ConfigError, match=r"rank 1 of 2: ConfigError: '0\.bias' has no values"):
            keeper.observe(1.0, update(2))


def free_a_shard(directory):
    model = fully_shard(nn.Linear(4, 4), mesh=init_device_mesh("cpu", (2,)))
    for file_format in ("torch", "dcp"):
        with BestKeeper(model, directory=directory / file_format, metric_key="loss", format=file_format) as keeper:
            keeper.observe(2.0, update(1))
            shard = model.weight.to_local().detach()
            if dist.get_rank() == 1:
                kept, size = shard.clone(), shard.untyped_storage().nbytes()
                free(shard)
            with pytest.raises(ConfigError, match="rank 1 of 2: ConfigError: 'weight' has no values"):
                keeper.observe(1.0, update(2))
            if dist.get_rank() == 1:
                shard.untyped_storage().resize_(size)
                shard.copy_(kept)


@pytest.mark.parametrize("run", [free_on_one_rank, free_a_shard, free_state_of_an_optimizer])
def test_what_one_rank_has_freed_is_refused_on_every_rank(run, tmp_path):
    assert run_ranks(run, 2, tmp_path) == [None, None]


@EVERY_FORMAT
def test_freed_weight_is_no_place_to_load_into(file_format, tmp_path):
    model = layers()
    with BestKeeper(model, directory=tmp_path, metric_key="loss", format=file_format) as keeper:
        keeper.observe(1.0, update(1))
    before = model[1].weight.detach().zero_().clone()
    free(model[0].weight)
    with pytest.raises(SnapshotError, match=r"storage of the model is freed, or too small .* for 0\.weight\. Nothing"):
        load(tmp_path, "best_model.loss", model)
    assert torch.equal(model[1].weight, before)


@EVERY_FORMAT
@pytest.mark.parametrize("in_background", [False, True])
def test_user_may_free_and_restore_a_weight_after_a_save(in_background, file_format, tmp_path):
    model = layers()
    settings = {"directory": tmp_path, "metric_key": "loss", "format": file_format, "async_save": in_background}
    first, second = (BestKeeper(model, id=name, **settings) for name in ("one", "two"))
    with first, second:
        for keeper in (first, second):
            keeper.start()
        for keeper in (first, second):
            keeper.observe(1.0, update(1))
            keeper.flush()
        for tensor in model.state_dict().values():
            storage = tensor.untyped_storage()
            values, size = tensor.clone(), storage.nbytes()
            storage.resize_(0)
            storage.resize_(size)
            tensor.copy_(values)
        assert second.observe(0.5, update(2)).is_new_best

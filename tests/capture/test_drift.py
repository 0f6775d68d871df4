"""What ranks hold in common is compared again at each save, since nothing may keep it equal."""

from __future__ import annotations

import logging
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from keepbest import load
from keepbest.errors import ConfigError
from keepbest.modules.kinds import local_of
from tests.capture.test_inventory import keeper_of, three_layers
from tests.kit.pool import run_ranks
from tests.kit.runs import set_weights, update
from tests.kit.strategies import CPU


def let_ranks_drift_apart(directory, file_format):
    model = three_layers()
    set_weights(model, 1.0)
    with keeper_of(model, directory, format=file_format) as keeper:
        keeper.observe(2.0, update(1))
        with torch.no_grad():
            model[1].weight[0, 0] += float(dist.get_rank())  # as without an exchange of gradients
        with pytest.raises(ConfigError) as caught:
            keeper.observe(1.0, update(2))
        with torch.no_grad():
            model[1].weight[0, 0] = 3.0
        return str(caught.value), keeper.observe(1.5, update(3)).is_new_best


@pytest.mark.parametrize("file_format", ["torch", "dcp"])
def test_weights_that_drift_apart_in_training_are_refused(file_format, tmp_path):
    for message, is_kept_later in run_ranks(let_ranks_drift_apart, 3, tmp_path, file_format):
        assert re.match("ranks 0, 1, 2 hold different weights under the same name: 1.weight", message)
        assert "They were equal when the keeper started" in message
        assert is_kept_later
    load(tmp_path, "best_model.loss", model := three_layers())
    assert model[1].weight[0, 0].item() == 3.0


def let_tied_stages_drift_apart(directory):
    """The embedding is on the first and on the last stage, whose gradients nobody exchanges."""
    rank = dist.get_rank()
    model = nn.ModuleDict({f"stage{rank}": nn.Linear(2, 2), **({} if rank == 1 else {"embedding": nn.Linear(2, 2)})})
    set_weights(model, 1.0)
    with keeper_of(model, directory) as keeper:
        keeper.observe(2.0, update(1))
        if rank == 2:
            set_weights(model["embedding"], 2.0)
        with pytest.raises(
            ConfigError, match=r"ranks 0, 2 hold different weights under the same name: embedding\.weight"
        ):
            keeper.observe(1.0, update(2))


def test_weights_that_a_part_of_the_ranks_holds_may_not_drift_apart(tmp_path):
    run_ranks(let_tied_stages_drift_apart, 3, tmp_path)


def drift_apart_when_a_layer_changes(directory):
    model = three_layers()
    with keeper_of(model, directory) as keeper:
        keeper.observe(2.0, update(1))
        set_weights(model[1], float(dist.get_rank()))
        model.append(three_layers()[2])  # the same on every rank
        with pytest.raises(ConfigError, match=r"hold different weights under the same name: 1\.weight"):
            keeper.observe(1.0, update(2))


def test_weights_that_drift_apart_beside_a_change_are_refused(tmp_path):
    run_ranks(drift_apart_when_a_layer_changes, 2, tmp_path)


def frozen(model):
    return model.requires_grad_(False), lambda: None


def frozen_on_rank_1(model):
    return model.requires_grad_(dist.get_rank() != 1), lambda: None


def scaled_integers(model):
    def quantized(scale):
        return torch.quantize_per_tensor(torch.full((2, 2), scale), scale, 0, torch.qint8)

    model[1].weight = nn.Parameter(quantized(1.0), requires_grad=False)
    return model, lambda: setattr(model[1].weight, "data", quantized(1.0 + dist.get_rank()))


def ignored_by_ddp(model):
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["1.weight"])
    return DistributedDataParallel(model), lambda: None


def in_ddp_with_a_hook(model):
    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(None, fp16_compress_hook)
    return wrapped, lambda: None


def called_past_ddp(model):
    return DistributedDataParallel(model), lambda: None


def unfrozen_in_ddp(model):
    model[1].requires_grad_(False)
    return DistributedDataParallel(model), lambda: model.requires_grad_(True)


def in_ddp_of_two(model):
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return DistributedDataParallel(model, process_group=groups[dist.get_rank() // 2]), lambda: None


def sharded_among_two(model):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))["shards"]
    return fully_shard(model, mesh=mesh), lambda: None


def unsharded_by_fsdp1(model):
    strategy = ShardingStrategy.NO_SHARD
    return FullyShardedDataParallel(
        model, device_id=CPU, sharding_strategy=strategy, use_orig_params=True
    ), lambda: None


UNSYNCHRONIZED = [
    frozen, frozen_on_rank_1, scaled_integers, called_past_ddp, ignored_by_ddp, in_ddp_with_a_hook,
    unfrozen_in_ddp, in_ddp_of_two, sharded_among_two, unsharded_by_fsdp1,
]  # fmt: skip


def let_each_drift_apart(directory):
    outcomes = []
    for case in UNSYNCHRONIZED:
        inner = three_layers()
        set_weights(inner, 1.0)
        model, change = case(inner)
        with keeper_of(model, directory / case.__name__) as keeper:
            keeper.observe(2.0, update(1))
            change()
            if case is not scaled_integers:
                with torch.no_grad():
                    local_of(inner[1].weight).add_(dist.get_rank())
            try:
                keeper.observe(1.0, update(2))
                outcomes.append(f"{case.__name__} was kept")
            except ConfigError as error:
                named = re.search(r"hold different weights under the same name: .*1\.weight", str(error))
                outcomes.append("refused" if named else str(error))
    return set(outcomes)


def test_weights_that_nothing_synchronizes_may_not_drift_apart(tmp_path):
    assert run_ranks(let_each_drift_apart, 4, tmp_path) == [{"refused"}] * 4


class Mean(nn.Module):
    """Keeps a mean, which it updates itself, as a parameter."""

    def __init__(self):
        super().__init__()
        self.running_mean = nn.Parameter(torch.zeros(4), requires_grad=False)


def differ_in_buffers(directory, wrap):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    set_weights(model, 1.0)
    if wrap == "ddp":
        model = DistributedDataParallel(model)
    elif wrap == "frozen in ddp":
        model[1] = Mean()
        model = DistributedDataParallel(model)
    elif wrap == "ddp on rank 1":
        group = dist.new_group([1])
        model = DistributedDataParallel(model, process_group=group) if dist.get_rank() == 1 else model
    else:
        model = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("keepbest").addHandler(handler)
    with keeper_of(model, directory) as keeper:
        for number in range(1, 4):
            if number > 1:
                own = [*model.named_buffers(), *model.named_parameters()]
                next(value for name, value in own if "mean" in name).fill_(float(dist.get_rank()))
            keeper.observe(1.0 / number, update(number))
    return [message for message in messages if "buffers differ" in message]


@pytest.mark.parametrize("wrap", ["fsdp2", "ddp on rank 1", "frozen in ddp"])
def test_buffers_that_differ_are_a_warning_once_with_the_remedy(wrap, tmp_path):
    [message], nothing = run_ranks(differ_in_buffers, 2, tmp_path, wrap)
    assert "buffers differ between the ranks: 1.running_mean (" in message
    assert "SyncBatchNorm" in message
    assert nothing == []


def test_buffers_that_ddp_broadcasts_are_no_reason_to_warn(tmp_path):
    assert run_ranks(differ_in_buffers, 2, tmp_path, "ddp") == [[], []]

"""What ranks hold in common is compared again at each save, since nothing may keep it equal."""

from __future__ import annotations

import logging
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from keepbest import load
from keepbest.errors import ConfigError
from tests.capture.test_inventory import keeper_of, three_layers
from tests.kit.pool import run_ranks
from tests.kit.runs import set_weights, update


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


def differ_in_buffers(directory, wrap):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    set_weights(model, 1.0)
    model = DistributedDataParallel(model) if wrap == "ddp" else fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("keepbest").addHandler(handler)
    with keeper_of(model, directory) as keeper:
        for number in range(1, 4):
            if number > 1:
                next(b for name, b in model.named_buffers() if "mean" in name).fill_(float(dist.get_rank()))
            keeper.observe(1.0 / number, update(number))
    return [message for message in messages if "buffers differ" in message]


def test_buffers_that_differ_are_a_warning_once_with_the_remedy(tmp_path):
    [message], nothing = run_ranks(differ_in_buffers, 2, tmp_path, "fsdp2")
    assert "buffers differ between the ranks: 1.running_mean. " in message
    assert "SyncBatchNorm" in message
    assert nothing == []


def test_buffers_that_ddp_broadcasts_are_no_reason_to_warn(tmp_path):
    assert run_ranks(differ_in_buffers, 2, tmp_path, "ddp") == [[], []]

"""The shards of a model on their way to rank 0, on the CPU: in buckets as from a GPU, and offloaded from one."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from keepbest import BestKeeper, load
from keepbest.capture.transfer import ShardTransfer
from keepbest.capture.whole import whole_tensor
from keepbest.ranks import Ranks
from tests.kit.models import filled, same_bits
from tests.kit.pool import run_ranks

REF = "best_model.loss"
SHAPES = ((7, 3), (1,), (0, 3), (4, 0), (2, 2, 2), (6, 11), (5,), (9, 40), (8,))
DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.complex64, torch.int64)
IN_BUCKETS = ("cpu:gloo",)


def meshes():
    """Meshes over all ranks, some of the same group, with the placements of shards of rows."""
    size = dist.get_world_size()
    group = dist.new_group()
    found = [
        (init_device_mesh("cpu", (size,)), [Shard(0)]),
        (DeviceMesh.from_group(group, "cpu"), [Shard(0)]),
        (init_device_mesh("cpu", (size, 1)), [Replicate(), Shard(0)]),
    ]
    if size == 4:
        found.append((init_device_mesh("cpu", (2, 2)), [Replicate(), Shard(0)]))
    return found


def values():
    generator = torch.Generator().manual_seed(0)
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        drawn = torch.randint(0, 100, shape, generator=generator)
        yield drawn > 50 if dtype == torch.bool else drawn.to(dtype)


def wrong_tensors(over, bucket, bucketed):
    """The numbers of the tensors that do not arrive as they are."""
    ranks = Ranks.connect()
    replicated = distribute_tensor(torch.zeros(3), over[0][0], [Replicate()], src_data_rank=None)
    moved = []
    with ShardTransfer(ranks, bucket=bucket, bucketed=bucketed) as shards:
        for number, value in enumerate(values()):
            tensor = distribute_tensor(value, *over[number // 5 % len(over)], src_data_rank=None)
            assert shards.can_move(tensor) == (ranks.world_size > 1)
            assert not shards.can_move(replicated)
            if number % 9 == 0:  # a collective of the same group, in between
                whole_tensor(tensor)
            if shards.can_move(tensor):
                room = torch.zeros(tensor.shape, dtype=tensor.dtype)
                moved.append((number, shards.move(tensor, lambda room=room: room, number), value))
    wanted = [(number, found, value if ranks.is_main else value.new_empty(0)) for number, found, value in moved]
    return [number for number, found, value in wanted if not same_bits(found, value)]


def wrong_in_buckets():
    over = meshes()
    ways = [(16, IN_BUCKETS), (48, IN_BUCKETS), (1 << 10, IN_BUCKETS), (1 << 26, IN_BUCKETS), (16, ())]
    return [(*way, wrong) for way in ways if (wrong := wrong_tensors(over, *way))]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_shards_arrive_bit_for_bit_in_buckets(world_size):
    assert run_ranks(wrong_in_buckets, world_size) == [[]] * world_size


def messages():
    """How many this rank sends, how many of them from outside of the shards, and the bytes of its largest bucket."""
    ranks = Ranks.connect()
    mesh = init_device_mesh("cpu", (ranks.world_size,))
    weights = [distribute_tensor(torch.rand(6, 50), mesh, [Shard(0)], src_data_rank=None) for _ in range(2)]
    storages = {each.to_local().untyped_storage().data_ptr() for each in weights}
    found = []
    batch = dist.batch_isend_irecv

    def record(operations):
        found.extend(each.tensor.untyped_storage() for each in operations)
        return batch(operations)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "batch_isend_irecv", record)  # nothing else shows what is sent
        with ShardTransfer(ranks, bucket=256, bucketed=IN_BUCKETS) as shards:
            for number, weight in enumerate(weights):
                shards.move(weight, lambda: torch.zeros(6, 50), number)
    if ranks.is_main:
        return max(storage.nbytes() for storage in found)
    return len(found), sum(storage.data_ptr() not in storages for storage in found)


def test_ranks_send_from_the_shards_themselves():
    """Two shards of 400 bytes on each of the other ranks, which take seven buckets."""
    assert run_ranks(messages, 3) == [256, (4, 0), (6, 0)]


def small(seed):
    return filled(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1)), seed)


def keep_without_cpu(directory):
    """What is not restored of a model on the CPU whose group knows none, as of one that NCCL shards and offloads."""
    mesh = DeviceMesh.from_group(dist.new_group(backend="cuda:gloo"), "cpu")
    model = fully_shard(small(0), mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()

    def shards():
        states = optimizer.state_dict()["state"].values()
        found = [*model.parameters(), *(each for state in states for each in state.values())]
        return [(each.to_local() if isinstance(each, DTensor) else each).detach().clone() for each in found]

    with BestKeeper(
        model, directory=directory, metric_key="loss", format="torch", training_state={"optimizer": optimizer}
    ) as keeper:
        keeper.observe(1.0, epoch=1)
    before = shards()
    optimizer.step()
    load(directory, REF, model, training_state={"optimizer": optimizer})
    return [number for number, each in enumerate(shards()) if not same_bits(each, before[number])]


def test_offloaded_shards_need_no_cpu_in_their_group(tmp_path):
    assert run_ranks(keep_without_cpu, 3, tmp_path) == [[], [], []]
    load(tmp_path, REF, model := small(1))
    assert not same_bits(model[0].weight, small(1)[0].weight)

"""Weights on their way from a device that has little memory, or none, with the CPU in its place."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from keepbest import BestKeeper, load
from keepbest.capture.transfer import ShardTransfer
from keepbest.errors import RankFailedError
from keepbest.ranks import Ranks
from tests.kit.models import filled, same_bits
from tests.kit.pool import run_ranks

REF = "best_model.loss"
KIB, MIB = 1 << 10, 1 << 20
IN_BUCKETS = ("cpu:gloo",)
CPU = torch.device("cpu")


class Device:
    """What `torch.empty` takes of the memory of a device, which is named by an object, and no string.

    Attributes:
        memory: Bytes that it has.
        taken: Bytes that are taken of it.
        most: The most bytes that were taken of it at a time.
    """

    def __init__(self, memory):
        self.memory, self.most, self.taken, self._empty = memory, 0, 0, torch.empty

    def empty(self, *arguments, device=None, **options):
        found = self._empty(*arguments, device=device, **options)
        if device == CPU and isinstance(device, torch.device):
            if self.taken + found.nbytes > self.memory:
                raise torch.OutOfMemoryError("no memory on the pretended device")
            self._add(found.nbytes)
            weakref.finalize(found, self._add, -found.nbytes)
        return found

    def _add(self, nbytes):
        self.taken += nbytes
        self.most = max(self.most, self.taken)


@contextmanager
def device_with(memory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", (device := Device(memory)).empty)
        yield device


def moved_through(memory, is_reserved):
    """Whether all arrives if rank 0 has so much memory for buckets of at most 1 MiB, and how much this rank took."""
    ranks = Ranks.connect()
    mesh = init_device_mesh("cpu", (ranks.world_size,))
    values = [torch.rand(rows, 300) for rows in (7, 300, 1000, 1)]
    tensors = [distribute_tensor(value, mesh, [Shard(0)]) for value in values]
    wanted = [tensor.full_tensor() for tensor in tensors]
    moved = []
    with device_with(memory if ranks.is_main else 8) as device:
        with ShardTransfer(ranks, bucket=MIB, bucketed=IN_BUCKETS) as shards:
            if is_reserved:
                shards.reserve(tensors)
            for number, tensor in enumerate(tensors):
                room = torch.zeros(tensor.shape)
                moved.append(shards.move(tensor, lambda room=room: room, number))
        assert device.taken == 0
    arrived = all(map(same_bits, moved, wanted)) if ranks.is_main else not any(map(torch.Tensor.numel, moved))
    return arrived, device.most


@pytest.mark.parametrize("is_reserved", [False, True])
@pytest.mark.parametrize("memory", [128, 255, 300, 4096])
def test_buckets_are_as_large_as_memory_allows(memory, is_reserved):
    """1.5 MiB are moved, which is known to those that reserve memory."""
    wanted = (1.5 if is_reserved else 2) * MIB
    (arrived, taken), *others = run_ranks(moved_through, 3, memory * KIB, is_reserved)
    assert arrived
    assert min(wanted, memory * KIB) / 2 <= taken <= min(wanted, memory * KIB)
    assert others == [(True, 8)] * 2


def taken_for_replicas():
    """What this rank took to move tensors that every rank has all of."""
    ranks = Ranks.connect()
    over = init_device_mesh("cpu", (ranks.world_size, 1))
    value = torch.arange(6.0)
    tensor = distribute_tensor(value, over, [Replicate(), Shard(0)])
    with device_with(MIB) as device, ShardTransfer(ranks, bucketed=IN_BUCKETS) as shards:
        shards.reserve([tensor])
        found = shards.move(tensor, lambda: torch.zeros(6), 0)
    return same_bits(found, value if ranks.is_main else value[:0]), device.most


def test_replicas_need_no_buckets():
    assert run_ranks(taken_for_replicas, 2) == [(True, 0)] * 2


def keep_with(directory, memory):
    """The error of a best where ranks have only so much memory, and whether the next one is right."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = fully_shard(small(0), mesh=mesh)
    error = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("keepbest.capture.gathered.ShardTransfer", partial(ShardTransfer, bucketed=IN_BUCKETS))
        with BestKeeper(model, directory=directory, metric_key="loss", format="torch") as keeper:
            with device_with(memory.get(dist.get_rank(), MIB)):
                try:
                    keeper.observe(2.0, epoch=1)
                except RankFailedError as raised:
                    error = str(raised)
            keeper.observe(1.0, epoch=2)
    load(directory, REF, model := small(1))
    return error, same_bits(model[0].weight, small(0)[0].weight)


def small(seed):
    return filled(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1)), seed)


@pytest.mark.parametrize(("full", "what"), [(0, "two buckets of 65536 bytes"), (1, "any message to rank 0")])
def test_no_memory_for_buckets_is_an_error_on_every_rank(tmp_path, full, what):
    found = run_ranks(keep_with, 3, tmp_path, {full: 0})
    errors = {error for error, _ in found}
    assert len(errors) == 1
    assert f"on rank {full} of 3: RankFailedError: there is no memory for {what}" in errors.pop()
    assert all(is_right for _, is_right in found)  # no rank was left in the middle of a transfer


@contextmanager
def without_memory_beside(tensors):
    """torch can put neither signs nor the order of elements into memory of the device that these tensors are on."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def refusing(name, is_done):
        method = getattr(torch.Tensor, name)

        def call(tensor):
            if not is_done(tensor) and tensor.untyped_storage().data_ptr() in storages:
                raise torch.OutOfMemoryError("no memory on the pretended device")
            return method(tensor)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "resolve_conj", refusing("resolve_conj", lambda tensor: not tensor.is_conj()))
        patch.setattr(torch.Tensor, "resolve_neg", refusing("resolve_neg", lambda tensor: not tensor.is_neg()))
        patch.setattr(torch.Tensor, "contiguous", refusing("contiguous", torch.Tensor.is_contiguous))
        patch.setattr(torch.Tensor, "cpu", refusing("cpu", torch.Tensor.is_contiguous))
        yield


class Stage(nn.Module):
    """A stage of a pipeline."""

    def __init__(self, values):
        super().__init__()
        for name, value in values.items():
            self.register_buffer(name, value)


def strange(seed):
    """Values that have other signs, or another order, in memory."""
    values = torch.randn(5, 4, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))
    return {"negated": values.conj().imag, "conjugated": values.conj(), "sliced": values.t()[:, 1:4]}


def keep_stages(directory, file_format):
    """Names of what is not kept as it is of two stages, one on each rank."""
    rank, stages = dist.get_rank(), [strange(0), strange(1)]
    model = nn.ModuleDict({f"stage{rank}": Stage(stages[rank])})
    with BestKeeper(model, directory=directory, metric_key="loss", format=file_format, async_save=True) as keeper:
        keeper.start()
        with without_memory_beside(stages[rank].values()):
            keeper.observe(1.0, epoch=1)
            keeper.flush()
    targets = [{name: torch.zeros(value.shape, dtype=value.dtype) for name, value in each.items()} for each in stages]
    load(directory, REF, nn.ModuleDict({f"stage{number}": Stage(each) for number, each in enumerate(targets)}))
    pairs = [(name, target[name], each[name]) for target, each in zip(targets, stages, strict=True) for name in each]
    return [name for name, found, expected in pairs if not torch.equal(found, expected)]


@pytest.mark.parametrize("file_format", ["torch", "dcp"])
def test_weights_that_a_full_device_cannot_put_in_order(tmp_path, file_format):
    assert run_ranks(keep_stages, 2, tmp_path, file_format) == [[], []]

"""Moves the shards of plainly sharded tensors straight to where rank 0 wants them, each once."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from types import TracebackType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from keepbest.capture.buckets import LEAST, BucketRoom, Buckets
from keepbest.modules.raw_bytes import raw_bytes
from keepbest.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

_BUCKET = 1 << 26  # bytes on a device


class ShardTransfer:
    """Point-to-point transfers to rank 0, under way together, all arrived when the block ends. **Collective**.

    What `full_tensor()` does with an all-gather, which leaves the whole tensor on every rank, this does without: ranks
    other than 0 send their shard from where it is and allocate nothing.

    Shards on the CPU are received where rank 0 wants them, and those on CUDA devices in buckets on its device.

    Args:
        ranks: Ranks of the model.
        bucket: Bytes of a bucket at most, a multiple of 16.
        bucketed: Kinds of device, each with the backend of the mesh for it, whose shards travel in buckets.
    """

    def __init__(self, ranks: Ranks, *, bucket: int = _BUCKET, bucketed: Container[str] = ("cuda:nccl",)) -> None:
        self._ranks = ranks
        self._size = bucket
        self._bucketed = bucketed
        self._rooms: dict[torch.device, BucketRoom] = {}
        self._buckets: dict[tuple[dist.ProcessGroup, torch.device], Buckets] = {}
        self._devices: set[torch.device] = set()  # the CUDA devices of what was moved
        self._under_way: list[dist.Work] = []
        self._over_all: dict[int, bool] = {}  # by the id of a mesh
        self._kept: list[torch.Tensor] = []  # what is being sent must live until it has arrived

    def reserve(self, tensors: Iterable[DTensor]) -> None:
        """Take what it takes of the memory of devices to move these of which it can. **Rank-local**.

        A lack of it is an error that every rank can raise as long as nothing is moved.

        Raises:
            RankFailedError: If a device has no memory for the least of buckets.
        """
        nbytes: dict[torch.device, int] = {}
        for tensor in tensors:
            before = nbytes.get(tensor.device, 0)
            if before < 2 * self._size and self.can_move(tensor) and self._needs_buckets(tensor):
                nbytes[tensor.device] = before + tensor.nbytes
        for device, wanted in nbytes.items():
            self._room(device, wanted)

    def _room(self, device: torch.device, nbytes: int) -> BucketRoom:
        """What buckets need on a device through which so many bytes are moved, or more."""
        if device not in self._rooms:
            half = max(LEAST, -(-nbytes // 2 // 16) * 16)
            self._rooms[device] = BucketRoom.take(device, min(self._size, half), receives=self._ranks.is_main)
        return self._rooms[device]

    def can_move(self, tensor: DTensor) -> bool:
        """Whether `tensor` is sharded along its first dimension over exactly these ranks, or replicas of that are.

        The same on every rank. Others (tensor parallel, replicated, on the device of a backend that cannot send from
        it) go through `full_tensor()`.
        """
        from torch.distributed.tensor import Replicate, Shard

        *outer, last = tensor.placements
        return (
            self._ranks.world_size > 1
            and all(isinstance(each, Replicate) for each in outer)
            and type(last) is Shard
            and last.dim == 0
            and self._is_over_all(tensor.device_mesh)
            and (tensor.device.type == "cpu" or self._is_bucketed(tensor))
        )

    def _is_over_all(self, mesh: DeviceMesh) -> bool:
        # torch makes the tensor of its ranks anew each time.
        if id(mesh) not in self._over_all:
            self._over_all[id(mesh)] = mesh.mesh.flatten().tolist() == self._ranks.members
        return self._over_all[id(mesh)]

    def _is_bucketed(self, tensor: DTensor) -> bool:
        kind = tensor.device.type
        return f"{kind}:{backends_of(shard_group(tensor.device_mesh)).get(kind)}" in self._bucketed

    def _needs_buckets(self, tensor: DTensor) -> bool:
        """Whether they are needed for what can be moved. If there is one shard, rank 0 has all of it."""
        return self._is_bucketed(tensor) and shard_count(tensor.device_mesh) > 1

    def move(self, tensor: DTensor, room: Callable[[], torch.Tensor], number: int) -> torch.Tensor:
        """Start to bring `tensor` to rank 0.

        Args:
            tensor: Tensor that `can_move`.
            room: Function that gives rank 0 a contiguous tensor of the global shape on the CPU.
            number: Number of the tensor, the same on every rank, by which what is sent and received is matched.

        Returns:
            On rank 0 the full tensor, whose values are there when the block has ended; elsewhere an empty tensor.
        """
        send = self._send_in_buckets if self._is_bucketed(tensor) else self._send_on_cpu
        shard = tensor.to_local().detach().resolve_conj().resolve_neg()
        if shard.is_cuda and shard.device not in self._devices:
            torch.cuda.synchronize(shard.device)  # any stream may write it
            self._devices.add(shard.device)
        whole = room() if self._ranks.is_main else None
        send(tensor, shard, whole, number)
        if whole is not None:
            whole[: shard.shape[0]].copy_(shard, non_blocking=True)
        return shard.new_empty(0) if whole is None else whole

    def _send_on_cpu(self, tensor: DTensor, shard: torch.Tensor, whole: torch.Tensor | None, number: int) -> None:
        of_mesh = shard_group(tensor.device_mesh)
        # That of a model which is offloaded from a device may know that device alone.
        group = of_mesh if "cpu" in backends_of(of_mesh) else self._ranks.patient_group()
        tag = 2 * number  # as a `ForeignTransfer`, which may use the same group for other numbers
        if whole is not None:
            for rank, rows in self._rows_of(tensor):
                if (piece := whole[rows]).numel():
                    self._add(dist.irecv(piece, group=group, group_src=rank, tag=tag))
        elif shard.numel() and self._ranks.rank < shard_count(tensor.device_mesh):
            sent = shard.contiguous()
            self._kept.append(sent)
            self._add(dist.isend(sent, group=group, group_dst=0, tag=tag))

    def _send_in_buckets(self, tensor: DTensor, shard: torch.Tensor, whole: torch.Tensor | None, number: int) -> None:
        del number  # matched by the order
        mesh = tensor.device_mesh
        if shard_count(mesh) == 1:
            return
        buckets = self._open(shard_group(mesh), shard.device)  # on each rank, so that all end the same buckets
        if self._ranks.rank >= shard_count(mesh):
            return  # it has the shard of a rank before it
        row_length = shard.dtype.itemsize * tensor.shape[1:].numel()
        mine = raw_bytes(shard) if whole is None else None
        for rank, rows in self._rows_of(tensor):
            values = raw_bytes(whole[rows]) if whole is not None else mine if rank == self._ranks.rank else None
            buckets.add(rank, (rows.stop - rows.start) * row_length, values)

    def _open(self, group: dist.ProcessGroup, device: torch.device) -> Buckets:
        if (group, device) not in self._buckets:
            for other in self._buckets.values():
                other.finish()  # so that the device holds the buckets of one group
            self._buckets = {(group, device): Buckets(group, self._room(device, 2 * self._size))}
        return self._buckets[group, device]

    def _rows_of(self, tensor: DTensor) -> list[tuple[int, slice]]:
        """The rows that each rank other than 0 has, as torch cuts them."""
        count, length = shard_count(tensor.device_mesh), tensor.shape[0]
        rows = -(-length // count)
        return [(rank, slice(min(rank * rows, length), min((rank + 1) * rows, length))) for rank in range(1, count)]

    def __enter__(self) -> ShardTransfer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            for buckets in self._buckets.values():
                buckets.finish()
            for work in self._under_way:
                work.wait()
            for device in self._devices:
                torch.cuda.current_stream(device).synchronize()
            self._buckets.clear()
            self._rooms.clear()

    def _add(self, work: dist.Work | None) -> None:
        if work is not None:
            self._under_way.append(work)


def shard_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The ranks that have the shards of one replica, if the last dimension of the mesh shards."""
    return mesh.get_group(mesh.ndim - 1)


def shard_count(mesh: DeviceMesh) -> int:
    """Number of these ranks."""
    return mesh.size(mesh.ndim - 1)


def backends_of(group: dist.ProcessGroup) -> dict[str, str]:
    """The backend of a group for each kind of device that it knows."""
    return dict(each.split(":", 1) for each in dist.get_backend_config(group).split(","))

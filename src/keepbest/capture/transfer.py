"""Moves the shards of plainly sharded tensors straight to where rank 0 wants them, each once."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from keepbest.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


class ShardTransfer:
    """Point-to-point transfers to rank 0, all under way at once, all arrived when the block ends. **Collective**.

    What `full_tensor()` does with an all-gather, which leaves the whole tensor on every rank, this does without: ranks
    other than 0 send their shard from where it is and allocate nothing.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._under_way: list[dist.Work] = []
        self._over_all: dict[int, bool] = {}  # by the id of a mesh
        self._kept: list[torch.Tensor] = []  # what is being sent must live until it has arrived

    def can_move(self, tensor: DTensor) -> bool:
        """Whether `tensor` is sharded along its first dimension over exactly these ranks, and on the CPU.

        The same on every rank. Others (tensor parallel, replicated, on an accelerator) go through `full_tensor()`.
        """
        from torch.distributed.tensor import Shard

        mesh = tensor.device_mesh
        return (
            tensor.device.type == "cpu"
            and mesh.ndim == 1
            and tuple(tensor.placements) == (Shard(0),)
            and self._is_over_all(mesh)
            and self._ranks.world_size > 1
        )

    def _is_over_all(self, mesh: DeviceMesh) -> bool:
        # torch makes the tensor of its ranks anew each time.
        if id(mesh) not in self._over_all:
            self._over_all[id(mesh)] = mesh.mesh.tolist() == self._ranks.members
        return self._over_all[id(mesh)]

    def move(self, tensor: DTensor, room: Callable[[], torch.Tensor], number: int) -> torch.Tensor:
        """Start to bring `tensor` to rank 0.

        Args:
            tensor: Tensor that `can_move`.
            room: Function that gives rank 0 a contiguous tensor of the global shape.
            number: Number of the tensor, the same on every rank, by which what is sent and received is matched.

        Returns:
            On rank 0 the full tensor, whose values are there when the block has ended; elsewhere an empty tensor.
        """
        group = tensor.device_mesh.get_group()
        shard = tensor.to_local().detach().resolve_conj().resolve_neg()
        if not self._ranks.is_main:
            if shard.numel():
                sent = shard.contiguous()
                self._kept.append(sent)
                self._add(dist.isend(sent, group=group, group_dst=0, tag=number))
            return shard.new_empty(0)
        whole = room()
        rows = -(-tensor.shape[0] // self._ranks.world_size)
        whole[: shard.shape[0]].copy_(shard)
        for rank in range(1, self._ranks.world_size):
            piece = whole[rank * rows : (rank + 1) * rows]
            if piece.numel():
                self._add(dist.irecv(piece, group=group, group_src=rank, tag=number))
        return whole

    def __enter__(self) -> ShardTransfer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            for work in self._under_way:
                work.wait()

    def _add(self, work: dist.Work | None) -> None:
        if work is not None:
            self._under_way.append(work)

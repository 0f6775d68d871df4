"""Bytes on their way from the devices of other ranks to rank 0, in buckets of bounded size."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from keepbest.errors import RankFailedError
from keepbest.modules.device_memory import unless_full

_ALIGNMENT = 16  # bytes, since NCCL is slow with values that begin elsewhere

LEAST = 1 << 16
"""Bytes of a bucket where there is no memory for more. torch finds so few in what it has for small tensors."""


class BucketRoom(NamedTuple):
    """Memory of a device that buckets need, whichever group they are for.

    Attributes:
        size: Bytes of a bucket, a multiple of 16.
        memory: On the rank that receives, two buckets of that size; nothing on the others.
        message: Room for one number.
    """

    size: int
    memory: Sequence[torch.Tensor]
    message: torch.Tensor

    @classmethod
    def take(cls, device: torch.device, size: int, *, receives: bool) -> BucketRoom:
        """Take it from `device`, with smaller buckets where there is no memory for such. **Rank-local**.

        Raises:
            RankFailedError: If there is no memory for the least of them.
        """
        if not receives:
            new = partial(torch.empty, 1, dtype=torch.int64, device=device)
            message: torch.Tensor | None = unless_full(new, lambda: None)
            if message is None:
                raise _no_memory_for(f"any message to rank 0, on {device}, which it needs to send its shards")
            return cls(size, (), message)
        least = min(size, LEAST)
        while not (memory := unless_full(partial(_two, size, device), lambda: None)):
            if size == least:
                raise _no_memory_for(f"two buckets of {least} bytes on {device}, in which the shards of others arrive")
            size = max(least, size // 2 // _ALIGNMENT * _ALIGNMENT)
        return cls(size, memory, memory[0][:8].view(torch.int64))


def _two(size: int, device: torch.device) -> Sequence[torch.Tensor] | None:
    return [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]


def _no_memory_for(what: str) -> RankFailedError:
    return RankFailedError(
        f"there is no memory for {what}. Leave some memory of the device free, as with smaller batches, or use "
        'format="dcp", with which each rank writes its own shards'
    )


class _Piece(NamedTuple):
    """Bytes of one rank in a bucket: where they begin in it, and what is sent, or where they lie on rank 0."""

    peer: int
    start: int
    values: torch.Tensor


class _Bucket(NamedTuple):
    pieces: list[_Piece]
    received: torch.Tensor | None
    works: list[dist.Work]


class Buckets:
    """Brings bytes of the ranks of a group to its rank 0. **Collective**: all make the same calls, in the same order.

    NCCL has no tags: what two ranks send and receive is matched by its order. So every rank counts the bytes of
    all ranks, and ends each bucket at the same byte. Other collectives of the group may run in between.

    A rank other than 0 sends from where the values are. Rank 0 has two buckets on the device, one of which is received
    while the other one is copied from. How large they are depends on the memory that it has, so it says so first.

    Args:
        group: Group of the ranks.
        room: Memory of the device that the values are on, taken before. Nothing else is taken.
    """

    def __init__(self, group: dist.ProcessGroup, room: BucketRoom) -> None:
        self._group, self._memory, self._device = group, room.memory, room.message.device
        self._flushed = 0
        self._pieces: list[_Piece] = []
        self._fill = 0
        self._posted: _Bucket | None = None
        self._landed: list[torch.cuda.Event] = []
        # The first thing that NCCL does in a group needs all of its ranks, and some may have nothing to send.
        if group.rank() == 0:
            room.message.copy_(torch.tensor([room.size], device="cpu"))
        dist.broadcast(room.message, group=group, group_src=0)
        self._size = int(room.message.item())

    def add(self, peer: int, length: int, values: torch.Tensor | None) -> None:
        """Add bytes that rank `peer` of the group has.

        Args:
            peer: Rank that sends them, not 0.
            length: Number of bytes.
            values: On `peer` the bytes; on rank 0 where they go, which may be on the host; on others nothing.
        """
        done = 0
        while done < length:
            taken = min(length - done, self._size - self._fill)
            if values is not None:
                self._pieces.append(_Piece(peer, self._fill, values[done : done + taken]))
            done += taken
            self._fill += -(-taken // _ALIGNMENT) * _ALIGNMENT
            if self._fill >= self._size:
                self.flush()

    def flush(self) -> None:
        """Send and receive what was added, also if it fills no bucket."""
        pieces, length = self._pieces, self._fill
        self._pieces, self._fill = [], 0
        if not pieces:
            return
        self._wait_for_landed()  # of the two buckets before this one, the first is empty again
        received = self._memory[self._flushed % 2][:length] if self._memory else None
        self._flushed += 1
        operations = [
            dist.P2POp(dist.isend, each.values, group=self._group, group_peer=0)
            if received is None
            else dist.P2POp(dist.irecv, _part(received, each), group=self._group, group_peer=each.peer)
            for each in pieces
        ]
        # As a batch, since NCCL would make a communicator for each pair of ranks otherwise.
        works = dist.batch_isend_irecv(operations)
        posted, self._posted = self._posted, _Bucket(pieces, received, works)
        self._land(posted)

    def finish(self) -> None:
        """Wait until everything has arrived."""
        self.flush()
        posted, self._posted = self._posted, None
        self._land(posted)
        self._wait_for_landed()

    def _land(self, bucket: _Bucket | None) -> None:
        """Copy a bucket to where its bytes go, once it has arrived."""
        if bucket is None:
            return
        for work in bucket.works:
            work.wait()  # of NCCL: the current stream waits, and not this thread
        if bucket.received is not None:
            for each in bucket.pieces:
                each.values.copy_(_part(bucket.received, each), non_blocking=True)
        if self._device.type == "cuda":
            self._landed.append(torch.cuda.current_stream(self._device).record_event())

    def _wait_for_landed(self) -> None:
        for event in self._landed:
            event.synchronize()
        self._landed.clear()


def _part(bucket: torch.Tensor, piece: _Piece) -> torch.Tensor:
    return bucket[piece.start : piece.start + piece.values.numel()]

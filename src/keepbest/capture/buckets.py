"""Bytes on their way from the devices of other ranks to rank 0, in buckets of bounded size."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

_ALIGNMENT = 16  # bytes, since NCCL is slow with values that begin elsewhere


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

    A rank other than 0 sends from where the values are. Rank 0 has up to two buckets on the device, one of which is
    received while the other one is copied from.

    Args:
        group: Group of the ranks.
        device: Device that the values are on.
        size: Bytes of a bucket, a multiple of 16.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, size: int) -> None:
        self._group, self._device, self._size = group, device, size
        self._rank = group.rank()
        self._pieces: list[_Piece] = []
        self._fill = 0
        self._posted: _Bucket | None = None
        self._landed: list[torch.cuda.Event] = []
        # The first thing that NCCL does in a group needs all of its ranks, and some may have nothing to send.
        dist.broadcast(torch.zeros(1, dtype=torch.uint8, device=device), group=group, group_src=0)

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
        received = torch.empty(length, dtype=torch.uint8, device=self._device) if self._rank == 0 else None
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

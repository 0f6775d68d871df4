"""The memory that an exchange of bytes works on."""

from __future__ import annotations

import torch


class Row:
    """Bytes that one rank sends, and a tensor over the same memory.

    Args:
        size: Number of bytes.
    """

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        # A tensor that is made in inference mode could not be written to outside of it, and these are used again.
        with torch.inference_mode(mode=False):
            self.tensor = torch.frombuffer(self.data, dtype=torch.uint8)


class Buffers:
    """Bytes that this rank sends in one exchange, and those that it receives from every rank.

    Args:
        size: Number of bytes that each rank sends.
        world_size: Number of ranks.

    Attributes:
        size: As passed.
        sent: Bytes that this rank sends.
        rows: Received bytes, by rank.
    """

    def __init__(self, size: int, world_size: int) -> None:
        self.size = size
        self.sent = Row(size)
        self.rows = [Row(size) for _ in range(world_size)]

    def keep_own(self, rank: int) -> None:
        """Receive what this rank, `rank`, sends."""
        self.rows[rank].data[:] = self.sent.data

    def received(self) -> list[bytes]:
        """Return what the ranks sent, by rank."""
        return [bytes(row.data) for row in self.rows]

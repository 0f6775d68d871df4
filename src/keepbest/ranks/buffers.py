"""The memory that an exchange of bytes works on."""

from __future__ import annotations

import torch


class Buffers:
    """Bytes that this rank sends in one exchange, and those that it receives from every rank.

    Args:
        size: Number of bytes that each rank sends.
        world_size: Number of ranks.

    Attributes:
        sent: Bytes that this rank sends.
        row: Tensor over the same memory as `sent`.
        rows: Tensors over the received bytes, by rank.
    """

    def __init__(self, size: int, world_size: int) -> None:
        self.sent = bytearray(size)
        self._received = [bytearray(size) for _ in range(world_size)]
        # A tensor that is made in inference mode could not be written to outside of it, and these are used again.
        with torch.inference_mode(mode=False):
            self.row = torch.frombuffer(self.sent, dtype=torch.uint8)
            self.rows = [torch.frombuffer(row, dtype=torch.uint8) for row in self._received]

    def keep_own(self, rank: int) -> None:
        """Receive what this rank, `rank`, sends."""
        self._received[rank][:] = self.sent

    def received(self) -> list[bytes]:
        """Return what the ranks sent, by rank."""
        return [bytes(row) for row in self._received]

"""Where the values of a snapshot stand on the host until they are written."""

from __future__ import annotations

from typing import Protocol

import torch


class Slot(Protocol):
    """Room for one snapshot on the CPU. **Rank-local**."""

    def put(self, key: str, value: torch.Tensor) -> torch.Tensor:
        """The values of a full tensor on the CPU, which stay as they are until they are written."""

    def copy(self, key: str, value: torch.Tensor) -> torch.Tensor:
        """As `put`, for a tensor that is about to be freed."""

    def room(self, key: str, like: torch.Tensor) -> torch.Tensor:
        """A contiguous CPU tensor of the (global) shape and dtype of `like`, for the caller to fill."""

    def wait(self) -> None:
        """Wait until all copies have arrived; on the thread that writes."""

    def release(self) -> None:
        """Give the room back when the snapshot is written; from any thread."""


class Staging(Protocol):
    """Hands out slots. **Rank-local**.

    Attributes:
        waits: Whether `claim` may have to wait for a write.
    """

    @property
    def waits(self) -> bool: ...

    def claim(self) -> Slot:
        """A slot to fill."""

    def close(self) -> None:
        """Free what the slots hold, once they are released; nothing is claimed any more."""


class LiveSlot:
    """No room of its own: weights on the CPU are written from where they are, before training continues."""

    def put(self, key: str, value: torch.Tensor) -> torch.Tensor:
        del key
        return value.cpu()

    def copy(self, key: str, value: torch.Tensor) -> torch.Tensor:
        del key
        return value.to("cpu", copy=True)

    def room(self, key: str, like: torch.Tensor) -> torch.Tensor:
        del key
        return torch.empty(like.shape, dtype=like.dtype)

    def wait(self) -> None:
        """Nothing is under way."""

    def release(self) -> None:
        """Nothing was claimed."""


class Unstaged:
    """For saves that are waited for: every slot is a `LiveSlot`."""

    waits = False

    def claim(self) -> LiveSlot:
        return LiveSlot()

    def close(self) -> None:
        """There is nothing to free."""

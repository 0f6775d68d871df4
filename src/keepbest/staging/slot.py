"""Where the values of a snapshot stand on the host until they are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from keepbest.modules.kinds import is_dense


class Like(NamedTuple):
    """What room is wanted for.

    Attributes:
        shape: Shape of the whole tensor.
        dtype: Its dtype.
        device: Type of the device that its values come from.
        is_live: Whether it is a whole tensor of the model, which can be written from where it is if it is on the CPU.
    """

    shape: Sequence[int]
    dtype: torch.dtype
    device: str
    is_live: bool = False


class Slot(Protocol):
    """Room for one snapshot on the CPU. **Rank-local**.

    Attributes:
        is_live: Whether training waits for the write, so that values can be written from where the model has them.
    """

    @property
    def is_live(self) -> bool: ...

    def reserve(self, key: str, like: Like) -> None:
        """Allocate room now, so that a lack of memory shows before anything is on its way."""

    def put(self, key: str, value: torch.Tensor) -> torch.Tensor:
        """The values of a full tensor on the CPU, which stay as they are until they are written."""

    def copy(self, key: str, value: torch.Tensor) -> torch.Tensor:
        """As `put`, for a tensor that is about to be freed."""

    def room(self, key: str, like: Like) -> torch.Tensor:
        """A contiguous CPU tensor of this shape and dtype, for the caller to fill."""

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
    """Weights on the CPU are written from where they are, before training continues. Others get room of their own."""

    is_live = True

    def __init__(self) -> None:
        self._rooms: dict[str, torch.Tensor] = {}

    def reserve(self, key: str, like: Like) -> None:
        if not like.is_live or like.device != "cpu":
            self._rooms[key] = torch.empty(tuple(like.shape), dtype=like.dtype)

    def put(self, key: str, value: torch.Tensor) -> torch.Tensor:
        room = self._reserved(key, value)
        return value.cpu() if room is None else room.copy_(value)

    def copy(self, key: str, value: torch.Tensor) -> torch.Tensor:
        room = self._reserved(key, value)
        return value.to("cpu", copy=True) if room is None else room.copy_(value)

    def _reserved(self, key: str, value: torch.Tensor) -> torch.Tensor | None:
        room = self._rooms.pop(key, None)
        fits = room is not None and (room.shape, room.dtype) == (value.shape, value.dtype) and is_dense(value)
        return room if fits else None

    def room(self, key: str, like: Like) -> torch.Tensor:
        room = self._rooms.pop(key, None)
        return torch.empty(tuple(like.shape), dtype=like.dtype) if room is None else room

    def wait(self) -> None:
        """Nothing is under way."""

    def release(self) -> None:
        self._rooms.clear()


class Unstaged:
    """For saves that are waited for: every slot is a `LiveSlot`."""

    waits = False

    def claim(self) -> LiveSlot:
        return LiveSlot()

    def close(self) -> None:
        """There is nothing to free."""

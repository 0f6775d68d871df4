"""Where the values of a snapshot stand on the host until they are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple, Protocol

import torch

from keepbest.staging.batch import Batch


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

    @property
    def nbytes(self) -> int:
        """Number of bytes of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def empty(self) -> torch.Tensor:
        """Room for it, with a storage of its own."""
        return torch.empty(tuple(self.shape), dtype=self.dtype, device="cpu")


class Needs(NamedTuple):
    """What the first snapshot will need on a rank, as far as it is known before.

    Attributes:
        rooms: What room is needed for.
        is_sure: Whether a slot will be asked for just these rooms, so that they can be made beforehand.
        devices: Devices that all of it comes from at once.
    """

    rooms: Mapping[str, Like]
    is_sure: bool
    devices: AbstractSet[torch.device]


class Slot(Protocol):
    """Room for one snapshot on the CPU. **Rank-local**.

    Attributes:
        is_live: Whether training waits for the write, so that values can be written from where the model has them.
    """

    @property
    def is_live(self) -> bool: ...

    def reserve(self, wanted: Mapping[str, Like]) -> None:
        """Allocate room now, so that a lack of memory shows before anything is on its way."""

    def put(self, key: str, value: torch.Tensor) -> torch.Tensor:
        """The values of a full tensor on the CPU, once the slot is sealed, until they are written.

        The tensor lives, and stays as it is, until then.
        """

    def put_all(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        """As `put`, for many tensors, for which room is reserved. There may be others in what it returns."""

    def copy(self, key: str, value: torch.Tensor) -> torch.Tensor:
        """As `put`, for a tensor that is about to be freed."""

    def room(self, key: str, like: Like) -> torch.Tensor:
        """A contiguous CPU tensor of this shape and dtype, for the caller to fill."""

    def seal(self) -> None:
        """Take the values as they are now; on the thread that trains, which may change them from then on."""

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

    def prepare(self, needs: Needs) -> None:
        """Begin to allocate memory for the first snapshot, on a thread."""

    def claim(self) -> Slot:
        """A slot to fill."""

    def close(self) -> None:
        """Free what the slots hold, once they are released; nothing is claimed any more."""

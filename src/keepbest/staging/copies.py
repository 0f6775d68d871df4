"""Copies of a snapshot into its room on the host, all at once. **Rank-local**."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from keepbest.staging.batch import Batch, OnDevice
from keepbest.staging.device import Devices
from keepbest.staging.rooms import Row


class Copies:
    """Collects what is to be copied: thousands of tensors cost as little as one of their size.

    Args:
        devices: Way from CUDA devices.
    """

    def __init__(self, devices: Devices) -> None:
        self._devices = devices
        self._rooms: dict[str, torch.Tensor] = {}
        self._values: dict[str, torch.Tensor] = {}
        self._batches: list[tuple[Mapping[str, torch.Tensor], Batch]] = []
        self._under_way: list[torch.cuda.Event] = []

    def add(self, key: str, room: torch.Tensor, value: torch.Tensor) -> None:
        """Have a value copied into a room, which `begin` does."""
        self._rooms[key], self._values[key] = room, value

    def add_all(self, rooms: Mapping[str, torch.Tensor], batch: Batch) -> None:
        """Have each value copied into the room with its key, which `begin` does."""
        self._batches.append((rooms, batch))

    def begin(self, rows: Sequence[Row]) -> None:
        """Copy the values as they are now.

        Args:
            rows: Rows in which rooms lie one after the other.
        """
        batches = [*self._batches, (self._rooms, Batch(self._values))]
        self._rooms, self._values, self._batches = {}, {}, []
        for rooms, batch in batches:
            for device, values in batch.by_device.items():
                if device.type == "cuda":
                    self._under_way += self._bring(device, rows, rooms, values)
                else:
                    _copy(rows, rooms, values)

    def wait(self) -> None:
        """Wait until all has arrived; on any thread."""
        for event in self._under_way:
            with torch.cuda.device(event.device):  # else CUDA may make a context on the first device for this thread
                event.synchronize()
        self._under_way.clear()

    def _bring(
        self, device: torch.device, rows: Sequence[Row], rooms: Mapping[str, torch.Tensor], values: OnDevice
    ) -> list[torch.cuda.Event]:
        found = values.fill([row.keys for row in rows])
        filled = [(row, series) for row, series in zip(rows, found.series, strict=True) if series is not None]
        return self._devices.bring(device, filled, (_those(rooms, found.rest), _those(values.by_key, found.rest)))


def _copy(rows: Sequence[Row], rooms: Mapping[str, torch.Tensor], values: OnDevice) -> None:
    blocks = [block for row in rows for block in row.blocks if block.is_one and block.is_small]
    found = values.fill([block.keys for block in blocks])
    for block, series in zip(blocks, found.series, strict=True):
        if series is not None:
            torch.cat(series.values, out=block.whole)
    if found.rest:
        torch._foreach_copy_(_those(rooms, found.rest), _those(values.by_key, found.rest))  # see ADR 10


def _those(tensors: Mapping[str, torch.Tensor], keys: Iterable[str]) -> list[torch.Tensor]:
    return list(map(tensors.__getitem__, keys))

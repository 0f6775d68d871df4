"""Copies of a snapshot into its room on the host, all at once. **Rank-local**."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import torch

from keepbest.staging.device import Devices
from keepbest.staging.rooms import Block, Row
from keepbest.staging.slot import Batch


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
            event.synchronize()
        self._under_way.clear()

    def _bring(
        self,
        device: torch.device,
        rows: Sequence[Row],
        rooms: Mapping[str, torch.Tensor],
        values: Mapping[str, torch.Tensor],
    ) -> list[torch.cuda.Event]:
        filled = [row for row in rows if _has_all(values, row.keys)]
        rest = _beside(filled, values)
        of_rows = [(row, _those(values, row.keys)) for row in filled]
        return self._devices.bring(device, of_rows, (_those(rooms, rest), _those(values, rest)))


def _copy(rows: Sequence[Row], rooms: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    filled = [block for row in rows for block in row.blocks if _has_all(values, block.keys)]
    for block in filled:
        torch.cat(_those(values, block.keys), out=block.whole)
    if rest := _beside(filled, values):
        torch._foreach_copy_(_those(rooms, rest), _those(values, rest))  # see ADR 10


def _has_all(values: Mapping[str, torch.Tensor], keys: Iterable[str]) -> bool:
    return all(map(values.__contains__, keys))


def _beside(filled: Sequence[Row] | Sequence[Block], values: Mapping[str, torch.Tensor]) -> list[str]:
    """Keys of the values that are in none of these."""
    found = set(chain.from_iterable(each.keys for each in filled))
    return [key for key in values if key not in found] if len(found) < len(values) else []


def _those(tensors: Mapping[str, torch.Tensor], keys: Iterable[str]) -> list[torch.Tensor]:
    return list(map(tensors.__getitem__, keys))

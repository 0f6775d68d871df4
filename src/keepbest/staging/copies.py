"""Copies of a snapshot into its room on the host, all at once. **Rank-local**."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

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
        self._under_way: list[torch.cuda.Event] = []

    def add(self, rooms: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
        """Have each value copied into the room with its key, which `begin` does."""
        self._rooms |= rooms
        self._values |= values

    def begin(self, rows: Sequence[Row]) -> None:
        """Copy the values as they are now.

        Args:
            rows: Rows in which rooms lie one after the other.
        """
        rooms, values = self._rooms, self._values
        self._rooms, self._values = {}, {}
        devices = {value.device for value in values.values() if value.is_cuda}
        for device in devices:
            there = {key: value for key, value in values.items() if value.device == device}
            whole = [row for row in rows if all(key in there for key in row.keys)]
            of_rows = [(row, [there.pop(key) for key in row.keys]) for row in whole]
            singles = [rooms[key] for key in there], list(there.values())
            self._under_way += self._devices.bring(device, of_rows, singles)
        others = [key for key, value in values.items() if not value.is_cuda] if devices else list(values)
        if others:
            torch._foreach_copy_([rooms[key] for key in others], [values[key] for key in others])  # see ADR 10

    def wait(self) -> None:
        """Wait until all has arrived; on any thread."""
        for event in self._under_way:
            event.synchronize()
        self._under_way.clear()

"""Copies of a snapshot into its room on the host, all at once. **Rank-local**."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from keepbest.staging.device import Devices
from keepbest.staging.rooms import Row


class _Copy(NamedTuple):
    room: torch.Tensor
    value: torch.Tensor


class Copies:
    """Collects what is to be copied: thousands of tensors cost as little as one of their size.

    Args:
        devices: Way from CUDA devices.
    """

    def __init__(self, devices: Devices) -> None:
        self._devices = devices
        self._waiting: dict[str, _Copy] = {}
        self._under_way: list[torch.cuda.Event] = []

    def add(self, key: str, room: torch.Tensor, value: torch.Tensor) -> None:
        """Have a value copied into its room, which `begin` does."""
        self._waiting[key] = _Copy(room, value)

    def begin(self, rows: Sequence[Row]) -> None:
        """Copy the values as they are now.

        Args:
            rows: Rows in which rooms lie one after the other.
        """
        waiting, self._waiting = self._waiting, {}
        on_devices: dict[torch.device, dict[str, _Copy]] = {}
        rooms: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for key, copy in waiting.items():
            if copy.value.is_cuda:
                on_devices.setdefault(copy.value.device, {})[key] = copy
            else:
                rooms.append(copy.room)
                values.append(copy.value)
        if rooms:
            torch._foreach_copy_(rooms, values)  # see ADR 10
        for device, copies in on_devices.items():
            whole = [
                (row, [copies.pop(key).value for key in row.keys])
                for row in rows
                if all(key in copies for key in row.keys)
            ]
            singles = [copy.room for copy in copies.values()], [copy.value for copy in copies.values()]
            self._under_way += self._devices.bring(device, whole, singles)

    def wait(self) -> None:
        """Wait until all has arrived; on any thread."""
        for event in self._under_way:
            event.synchronize()
        self._under_way.clear()

"""Tensors that are copied together, and what is found out about them once for all copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import torch

from keepbest.modules.kinds import PLAIN_CLASSES

_CPU = torch.device("cpu")

Keys = Sequence[str]


class Series:
    """Tensors that come one after the other.

    Args:
        values: The tensors.
    """

    def __init__(self, values: list[torch.Tensor]) -> None:
        self.values = values

    @cached_property
    def is_in_order(self) -> bool:
        """Whether each has its elements, as they are read, side by side in memory."""
        return are_in_order(self.values)


class Filling(NamedTuple):
    """How tensors fill places.

    Attributes:
        series: For each place what fills it; `None` if something is missing there.
        rest: Keys of all tensors that are in none of these.
    """

    series: Sequence[Series | None]
    rest: Keys


class OnDevice:
    """Tensors by key, all on one device.

    Args:
        by_key: The tensors.
    """

    def __init__(self, by_key: Mapping[str, torch.Tensor]) -> None:
        self.by_key = by_key
        self._latest: tuple[Sequence[Keys], Filling] | None = None

    def fill(self, places: Sequence[Keys]) -> Filling:
        """Which of these places, of which each has these keys in order, the tensors fill."""
        if self._latest is None or self._latest[0] != places:
            self._latest = places, self._filling(places)
        return self._latest[1]

    def _filling(self, places: Sequence[Keys]) -> Filling:
        series = [self._series(keys) for keys in places]
        filled = set(chain.from_iterable(keys for keys, found in zip(places, series, strict=True) if found))
        return Filling(series, [key for key in self.by_key if key not in filled])

    def _series(self, keys: Keys) -> Series | None:
        return Series([self.by_key[key] for key in keys]) if all(map(self.by_key.__contains__, keys)) else None


class Batch:
    """Tensors that are copied at once.

    Args:
        values: Each tensor, by the key of its room.
    """

    def __init__(self, values: Mapping[str, torch.Tensor]) -> None:
        self.values = values

    @cached_property
    def is_plain(self) -> bool:
        """Whether the values of all lie where torch says."""
        return all(type(value) in PLAIN_CLASSES for value in self.values.values())

    @cached_property
    def by_device(self) -> Mapping[torch.device, OnDevice]:
        """Those on each CUDA device, and those elsewhere, as on the CPU."""
        found: dict[torch.device, dict[str, torch.Tensor]] = {}
        for key, value in self.values.items():
            found.setdefault(value.device if value.is_cuda else _CPU, {})[key] = value
        return {device: OnDevice(values) for device, values in found.items()}


def are_in_order(values: Sequence[torch.Tensor]) -> bool:
    """Whether each of them has its elements, as they are read, side by side in memory."""
    has_signs = any(map(torch.Tensor.is_conj, values)) or any(map(torch.Tensor.is_neg, values))
    return all(map(torch.Tensor.is_contiguous, values)) and not has_signs

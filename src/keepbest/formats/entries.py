"""Tensors that are read when their turn comes. **Rank-local**."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from keepbest.modules.raw_bytes import buffer_of
from keepbest.run.files import Files

_ALIGNMENT = 64


class FileEntry(NamedTuple):
    """A tensor of a file that is to be written: what is known before it is there, and how to get it."""

    key: str
    shape: Sequence[int]
    dtype: torch.dtype
    fetch: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        """Bytes that it takes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def fetched(entries: Sequence[FileEntry], space: Path) -> dict[str, torch.Tensor]:
    """Fetch all tensors, one at a time, into one file, and map them from there. Each has a storage of its own.

    One map holds them all, since the number of maps of a process is limited. The file is written and not filled through
    the map, since a full disk is an error of a write, and the end of a process that writes to a map.

    Args:
        entries: Tensors to fetch.
        space: New file. The caller removes it when the tensors are no longer needed.

    Raises:
        SnapshotError: If a tensor cannot be read.
        OSError: Any refusal of the file system.
    """
    tensors: dict[str, torch.Tensor] = {}
    places: list[tuple[FileEntry, int]] = []
    end = 0
    with Files().create(space) as file:
        for entry in entries:
            tensor = entry.fetch()
            if tensor.numel() == 0 or tensor.layout != torch.strided or tensor.is_quantized:
                tensors[entry.key] = tensor
                continue
            written = file.write(buffer_of(tensor))
            places.append((entry, end))
            padding = -written % _ALIGNMENT
            end += written + file.write(bytes(padding))
    if places:
        mapped = _mapped(space, end)
        for entry, start in places:
            flat = torch.frombuffer(mapped, dtype=torch.uint8, count=entry.bytes, offset=start)
            tensors[entry.key] = flat.view(entry.dtype).view(tuple(entry.shape))
    return {entry.key: tensors[entry.key] for entry in entries}


def _mapped(path: Path, size: int) -> mmap.mmap | bytearray:
    """The bytes of a file: mapped, or in memory on a file system that maps none."""
    with path.open("r+b") as file:
        try:
            return mmap.mmap(file.fileno(), size)
        except OSError:
            data = bytearray(size)
            file.readinto(data)
            return data

"""Tensors of a state dict that are one and the same."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from pathlib import Path

import torch

from keepbest.errors import SnapshotError
from keepbest.modules.kinds import has_shards
from keepbest.run.digest import Digest, DigestingFile
from keepbest.run.files import Files
from keepbest.run.no_links import open_file


def first_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """For each further name of a tensor its first name. Tensors without elements are never one."""
    seen: dict[Hashable, str] = {}
    tied: dict[str, str] = {}
    for key, tensor in tensors.items():
        if (first := seen.setdefault(identity_of(key, tensor), key)) != key:
            tied[key] = first
    return tied


def write_ties(files: Files, path: Path, tied: Mapping[str, str]) -> Digest:
    """Write further names of tensors, and the key of each, durably to a new file. Raises `OSError`."""
    with files.create(path) as file:
        sink = DigestingFile(file, is_waited_for=False)
        sink.write(json.dumps(dict(tied), indent=1).encode())
        sink.sync()
    return sink.digest


def read_ties(path: Path) -> dict[str, str]:
    """Read what `write_ties` wrote. Raises `SnapshotError`."""
    try:
        with open_file(path) as file:
            tied = json.loads(file.read())
    except (OSError, ValueError, RecursionError) as error:
        raise SnapshotError(f"{path} cannot be read: {error!r}") from error
    if not isinstance(tied, dict) or not all(isinstance(first, str) and first not in tied for first in tied.values()):
        raise SnapshotError(f"{path} does not hold names of tensors")
    return tied


def identity_of(key: str, tensor: torch.Tensor) -> Hashable:
    """What two keys of one tensor have in common, and those of others have not."""
    if has_shards(tensor) or tensor.layout != torch.strided:
        return id(tensor)  # such tensors have no one place, and where a rank's shard lies differs from rank to rank
    return _Place(tensor) if tensor.numel() else key


class _Place:
    """Where a tensor lies. What it is there is asked for only if another one begins at the same address."""

    __slots__ = ("_address", "_tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._address = tensor.data_ptr()

    def __hash__(self) -> int:
        return hash(self._address)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Place) and self._address == other._address and self._view() == other._view()

    def _view(self) -> Hashable:
        tensor = self._tensor
        return tensor.device, tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg()

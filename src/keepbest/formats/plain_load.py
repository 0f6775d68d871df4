"""Reads files of `torch.save` that anybody may have written. **Rank-local**.

No code of a file is run, and nothing grows when it is read: `torch.load` would inflate records that are compressed, and
a tensor may look at one element of the file many times.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from keepbest.errors import SnapshotError
from keepbest.formats.tied import first_names
from keepbest.formats.whole_file import can_be_mapped
from keepbest.modules.kinds import is_dense
from keepbest.modules.nested import leaves, spelled
from keepbest.run.no_links import open_file

_MOST_VIEWS = 16  # of the bytes of a file; those that look at the same bytes in another way are no further names


def load_plain(path: Path) -> Any:
    """What is in a file of `torch.save`: plain data, and tensors that are mapped from it. No code is run.

    Raises:
        SnapshotError: If it holds anything else, or records that would grow when they are read.
    """
    try:
        with open_file(path) as file:
            _check_is_stored(file)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=can_be_mapped(path))
    except Exception as error:
        raise SnapshotError(f"{path} cannot be read as weights: {type(error).__name__}: {error}") from error


def load_plain_bytes(data: bytes) -> Any:
    """As `load_plain`, for bytes. Raises the errors of zipfile and torch."""
    _check_is_stored(io.BytesIO(data))
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def check_sizes(path: Path, state: Mapping[Any, Any]) -> None:
    """Check that the tensors of a file hold no more than what is in it. Raises `SnapshotError`."""
    inside = ((path, value) for path, value in leaves(state) if isinstance(value, torch.Tensor) and is_dense(value))
    tensors = {spelled(path): value for path, value in inside}
    for key, tensor in tensors.items():
        if tensor.device.type == "cpu" and tensor.nbytes > (held := tensor.untyped_storage().nbytes()):
            raise SnapshotError(f"{path}: {key} would grow to {tensor.nbytes} bytes; the file holds {held} of them")
    tied = first_names(tensors)
    total = sum(each.nbytes for key, each in tensors.items() if key not in tied)
    try:
        there = path.stat().st_size
    except OSError as error:
        raise SnapshotError(f"{path} cannot be read: {error}") from error
    if total > _MOST_VIEWS * there:
        raise SnapshotError(f"{path}: its tensors would grow to {total} bytes; the file has {there}")


def _check_is_stored(file: Any) -> None:
    """Refuse a file whose records would take more bytes in memory than they do in it."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        size = file.seek(0, io.SEEK_END)
        packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
        if packed or archive.comment or sum(entry.file_size for entry in entries) > size:
            raise zipfile.BadZipFile("its records are compressed, or lie upon each other, which torch.save never does")

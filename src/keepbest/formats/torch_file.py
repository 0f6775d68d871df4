"""One state dict as a file of `torch.save`, written in a single pass with its digest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_crc32_options, set_crc32_options

from keepbest.errors import SnapshotError
from keepbest.run.digest import DigestingFile
from keepbest.run.files import Files

ENDING = ".pt"


def write_state_dict(files: Files, path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Write `state` durably to a new file that `torch.load(path, weights_only=True)` reads.

    Returns:
        What is recorded of the file: size, digest, and the number of `tensors`.

    Raises:
        OSError: whatever the file system answers.
    """
    compact = {key: _compact(value) for key, value in state.items()}
    with files.create(path) as file:
        sink = DigestingFile(file)
        try:
            with without_crc32():
                torch.save(compact, sink)  # type: ignore[arg-type]  # it needs write and flush only
        except RuntimeError as error:
            if sink.failure is not None:
                raise sink.failure from error
            raise
        file.sync()
    return {**sink.record, "tensors": sum(isinstance(value, torch.Tensor) for value in compact.values())}


def read_state_dict(path: Path) -> dict[str, Any]:
    """The state dict in `path`, its tensors mapped from the file. **Rank-local**.

    Raises:
        SnapshotError: if the file holds anything but plain weights; nothing in it was run.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise SnapshotError(f"{path} cannot be read as weights: {type(error).__name__}: {error}") from error
    if not isinstance(state, dict):
        raise SnapshotError(f"{path} holds a {type(state).__name__}, not a state dict")
    return state


@contextlib.contextmanager
def without_crc32() -> Iterator[None]:
    """Let torch write no checksum of each tensor: it takes as long as half of the write; a file's digest covers it."""
    before = get_crc32_options()
    set_crc32_options(compute_crc32=False)
    try:
        yield
    finally:
        set_crc32_options(compute_crc32=before)


def _compact(value: Any) -> Any:
    # A view would drag the whole storage that it looks into along into the file.
    if isinstance(value, torch.Tensor):
        value = value.detach()
        if value.untyped_storage().nbytes() != value.numel() * value.element_size():
            return value.clone(memory_format=torch.contiguous_format)
    return value

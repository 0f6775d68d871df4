"""One state dict, one file: written in a single pass with its digest, read only if the digest is right."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch.serialization import get_crc32_options, set_crc32_options

from keepbest.errors import SnapshotError
from keepbest.store.files import DurableFile, Files

DIGEST_ALGORITHM = "xxh3-128"
ENDING = ".pt"
_READ_BYTES = 1 << 22


class _DigestingFile:
    """A file object that digests what passes through it and remembers why a write failed.

    `torch.save` reports a failed write as its own `RuntimeError`; the cause (`ENOSPC`, ...) would be lost.
    """

    def __init__(self, file: DurableFile) -> None:
        self._file = file
        self._hash = xxhash.xxh3_128()
        self.bytes = 0
        self.failure: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        try:
            written = self._file.write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise
        self._hash.update(data)
        self.bytes += written
        return written

    def flush(self) -> None:
        self._file.flush()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


def write_state_dict(files: Files, path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Write `state` durably to a new file that `torch.load(path, weights_only=True)` reads.

    Returns:
        `bytes` and `digest` of the file, and the number of `tensors`.

    Raises:
        OSError: whatever the file system answers.
    """
    compact = {key: _compact(value) for key, value in state.items()}
    with files.create(path) as file:
        sink = _DigestingFile(file)
        try:
            with _without_crc32():
                torch.save(compact, sink)  # type: ignore[arg-type]  # it needs write and flush only
        except RuntimeError as error:
            if sink.failure is not None:
                raise sink.failure from error
            raise
        file.sync()
    tensors = sum(isinstance(value, torch.Tensor) for value in compact.values())
    return {"bytes": sink.bytes, "digest": sink.digest, "tensors": tensors}


def read_state_dict(path: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict in `path`, after its size and digest were found to be as `expected` says. **Rank-local**.

    Raises:
        SnapshotError: if the file is missing, damaged, or holds anything but plain weights; nothing in it was run.
    """
    check_file(path, expected)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise SnapshotError(f"{path} cannot be read as weights: {type(error).__name__}: {error}") from error
    if not isinstance(state, dict):
        raise SnapshotError(f"{path} holds a {type(state).__name__}, not a state dict")
    return state


def check_file(path: Path, expected: Mapping[str, Any]) -> None:
    """Compare size and digest of a file with what was recorded when it was written. **Rank-local**.

    Raises:
        SnapshotError: if they differ, or the file cannot be read.
    """
    if expected.get("algorithm", DIGEST_ALGORITHM) != DIGEST_ALGORITHM:
        raise SnapshotError(
            f"{path} was written with the digest {expected['algorithm']!r}; this version knows {DIGEST_ALGORITHM}"
        )
    digest = xxhash.xxh3_128()
    size = 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_READ_BYTES):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise SnapshotError(f"{path} cannot be read: {error}") from error
    if size != expected["bytes"]:
        raise SnapshotError(f"{path} is damaged: it has {size} bytes, {expected['bytes']} were written")
    if digest.hexdigest() != expected["digest"]:
        raise SnapshotError(
            f"{path} is damaged: its {DIGEST_ALGORITHM} is {digest.hexdigest()}, {expected['digest']} was written"
        )


@contextlib.contextmanager
def _without_crc32() -> Iterator[None]:
    # torch's own checksum of each tensor took as long as half of the write; the digest of the file covers it.
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

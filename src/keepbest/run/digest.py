"""Digests that tell whether a file still is what was written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from keepbest.errors import SnapshotError
from keepbest.run.files import DurableFile

DIGEST_ALGORITHM = "xxh3-128"
_READ_BYTES = 1 << 22


class DigestingFile:
    """A file object that digests what passes through it and remembers why a write failed.

    `torch.save` reports a failed write as its own `RuntimeError`; the cause (`ENOSPC`, ...) would be lost.

    Attributes:
        bytes: that were written.
        failure: of the first write that failed.
    """

    def __init__(self, file: DurableFile) -> None:
        self._file = file
        self._hash = xxhash.xxh3_128()
        self.bytes = 0
        self.failure: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data`. Raises `OSError`."""
        try:
            written = self._file.write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise
        self._hash.update(data)
        self.bytes += written
        return written

    def flush(self) -> None:
        """Nothing is buffered; part of the protocol of a file object."""
        self._file.flush()

    @property
    def record(self) -> dict[str, Any]:
        """What `check_file` compares a file with."""
        return _record(self.bytes, self._hash)


def digest_file(path: Path) -> dict[str, Any]:
    """What `check_file` compares a file with, read from the file. **Rank-local**. Raises `OSError`."""
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return _record(size, digest)


def check_file(path: Path, expected: Mapping[str, Any]) -> None:
    """Compare size and digest of a file with what was recorded when it was written. **Rank-local**.

    Raises:
        SnapshotError: if they differ, or the file cannot be read.
    """
    if expected.get("algorithm", DIGEST_ALGORITHM) != DIGEST_ALGORITHM:
        raise SnapshotError(
            f"{path} was written with the digest {expected['algorithm']!r}; this version knows {DIGEST_ALGORITHM}"
        )
    try:
        found = digest_file(path)
    except OSError as error:
        raise SnapshotError(f"{path} cannot be read: {error}") from error
    if found["bytes"] != expected["bytes"]:
        raise SnapshotError(f"{path} is damaged: it has {found['bytes']} bytes, {expected['bytes']} were written")
    if found["digest"] != expected["digest"]:
        raise SnapshotError(
            f"{path} is damaged: its {DIGEST_ALGORITHM} is {found['digest']}, {expected['digest']} was written"
        )


def _record(size: int, digest: xxhash.xxh3_128) -> dict[str, Any]:
    return {"bytes": size, "digest": digest.hexdigest(), "algorithm": DIGEST_ALGORITHM}

"""Digests that show whether a file still is what was written."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import xxhash

from keepbest.errors import ConfigError, SnapshotError
from keepbest.run.files import DurableFile
from keepbest.run.no_links import open_file
from keepbest.worker import Threaded

DIGEST_ALGORITHM = "xxh3-128"
_READ_BYTES = 1 << 22
_HELD_BYTES = 1 << 16
_LARGE_BYTES = 1 << 22  # to start a thread takes less than to digest these


class Digest(NamedTuple):
    """Size and digest of the bytes of a file, and the algorithm of the digest."""

    bytes: int
    digest: str
    algorithm: str = DIGEST_ALGORITHM


class DigestingFile:
    """A file object that digests what passes through it.

    Args:
        file: The file.
        is_waited_for: Whether somebody waits for the file. Then a thread digests what is large while it is written.
            Else that thread would compete for the interpreter's lock with training.
    """

    def __init__(self, file: DurableFile, *, is_waited_for: bool) -> None:
        self._file = file
        self._is_waited_for = is_waited_for
        self._hash = xxhash.xxh3_128()
        self._bytes = 0
        self._held = bytearray()  # torch writes each small tensor in many pieces

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data`, together with what follows if there is little of it. Raises `OSError`."""
        if len(data) < _HELD_BYTES:
            self._held += data
        else:
            self.flush()
            self._pass(data)
        if len(self._held) >= _HELD_BYTES:
            self.flush()
        return len(data)

    def flush(self) -> None:
        """Write what is held. Raises `OSError`."""
        held, self._held = self._held, bytearray()
        if held:
            self._pass(held)

    def sync(self) -> None:
        """Write what is held, and wait until all of it is on the disk. Raises `OSError`."""
        self.flush()
        self._file.sync()

    def _pass(self, data: bytes | bytearray | memoryview) -> None:
        thread = _new_thread() if self._is_waited_for and len(data) >= _LARGE_BYTES else None
        if thread is None:
            self._bytes += self._file.write(data)
            self._hash.update(data)
            return
        errors: list[BaseException] = []
        try:
            thread.submit(partial(self._hash.update, data), errors.append)
            self._bytes += self._file.write(data)
        finally:
            _end(thread)
        if errors:
            raise errors[0]

    @property
    def size(self) -> int:
        """The bytes that were written, or are held."""
        return self._bytes + len(self._held)

    @property
    def digest(self) -> Digest:
        """Of all that was written, after `sync`."""
        return Digest(self._bytes, self._hash.hexdigest())


def _new_thread() -> Threaded | None:
    """A thread to digest on, if one can be started: there may be too many, or the interpreter is about to exit."""
    try:
        return Threaded("keepbest-digest")
    except ConfigError:
        return None


def _end(thread: Threaded) -> None:
    """Wait until a thread no longer reads what its caller may free, however many interruptions come."""
    interruption: BaseException | None = None
    while True:
        try:
            thread.close()
        except BaseException as error:  # noqa: BLE001  # raised below
            interruption = error
        else:
            break
    if interruption is not None:
        raise interruption


def digest_file(path: Path) -> Digest:
    """The digest of a file that is there, and no link. **Rank-local**. Raises `OSError`."""
    with open_file(path) as file:
        return _digest(file)


def _digest(file: BinaryIO) -> Digest:
    found, size = xxhash.xxh3_128(), 0
    while chunk := file.read(_READ_BYTES):
        found.update(chunk)
        size += len(chunk)
    return Digest(size, found.hexdigest())


def check_file(path: Path, expected: Digest) -> None:
    """Compare size and digest of a file with what was recorded when it was written. **Rank-local**.

    Raises:
        SnapshotError: If they differ, or the file cannot be read.
    """
    if expected.algorithm != DIGEST_ALGORITHM:
        raise SnapshotError(
            f"{path} was written with the digest {expected.algorithm!r}; this version knows {DIGEST_ALGORITHM}"
        )
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            found = _digest(file) if size == expected.bytes else Digest(size, "")  # which may be very large
    except OSError as error:
        raise SnapshotError(f"{path} cannot be read: {error}") from error
    if found.bytes != expected.bytes:
        raise SnapshotError(f"{path} is damaged: it has {found.bytes} bytes, {expected.bytes} were written")
    if found.digest != expected.digest:
        raise SnapshotError(
            f"{path} is damaged: its {DIGEST_ALGORITHM} is {found.digest}, {expected.digest} was written"
        )

"""Digests that show whether a file still is what was written."""

from __future__ import annotations

import _thread
import contextlib
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import xxhash

from keepbest.errors import SnapshotError
from keepbest.run.files import DurableFile
from keepbest.run.no_links import open_file

DIGEST_ALGORITHM = "xxh3-128"
_READ_BYTES = 1 << 22
_HELD_BYTES = 1 << 16
_LARGE_BYTES = 1 << 20  # to start a thread takes less than to digest these


class Digest(NamedTuple):
    """Size and digest of the bytes of a file, and the algorithm of the digest."""

    bytes: int
    digest: str
    algorithm: str = DIGEST_ALGORITHM


class DigestingFile:
    """A file object that digests what passes through it.

    Args:
        file: The file.
        is_waited_for: Whether somebody waits for the file. Then a thread digests what is large while it is written, if
            it may run on another CPU. Else that thread would compete for the interpreter's lock with training.
    """

    def __init__(self, file: DurableFile, *, is_waited_for: bool) -> None:
        self._file = file
        self._has_thread = is_waited_for and _has_several_cpus()
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
        if not self._has_thread or len(data) < _LARGE_BYTES:
            self._bytes += self._file.write(data)
            self._hash.update(data)
            return
        digest = _Beside(partial(self._hash.update, data))
        try:
            try:
                digest.start()
                self._bytes += self._file.write(data)
            finally:
                digest.stop()  # the caller may free what the thread reads
        finally:
            digest.stop()  # an interruption may have come just before the first one
        digest.finish()

    @property
    def size(self) -> int:
        """The bytes that were written, or are held."""
        return self._bytes + len(self._held)

    @property
    def digest(self) -> Digest:
        """Of all that was written, after `sync`."""
        return Digest(self._bytes, self._hash.hexdigest())


def _has_several_cpus() -> bool:
    """Whether this process may run on several CPUs at once."""
    return (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1) > 1


class _Beside:
    """Work that a thread does beside other work. If it has not begun by the end of that, the caller does it.

    So nothing depends on the thread: there may be too many, or the interpreter may be busy, or about to exit.
    It is one without an object of `threading`, which would wait for it to begin, and for the interpreter's lock.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._turn = threading.RLock()  # the thread holds it while it works, the caller from `stop` on
        self._is_done = False
        self._error: BaseException | None = None

    def start(self) -> None:
        """Let a thread begin, if one can be started."""
        with contextlib.suppress(RuntimeError):  # then `finish` does the work
            _thread.start_new_thread(self._run, ())

    def stop(self) -> None:
        """Wait for the thread if it has begun, and keep it from it otherwise, however many interruptions come."""
        try:
            self._turn.acquire()  # once more does no harm
        except BaseException:
            self.stop()
            raise

    def finish(self) -> None:
        """After `stop`: do the work if it was not done, or raise why it failed."""
        if self._error is not None:
            raise self._error
        if not self._is_done:
            self._work()

    def _run(self) -> None:
        if not self._turn.acquire(blocking=False):
            return
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001  # raised again by `finish`
            self._error = error
        finally:
            self._is_done = True
            self._turn.release()


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

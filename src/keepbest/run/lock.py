"""One live process owns a run folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import struct
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from keepbest.errors import RunExistsError
from keepbest.run.lines import SENSELESS
from keepbest.run.no_links import open_file
from keepbest.user_code import Log

_logger = Log(__name__)
_HELD = (errno.EACCES, errno.EAGAIN)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_POLL_SECONDS = 0.1
_OWNER_BYTES = 1 << 16
# `struct flock` of a write lock on the whole file, as Linux has it: type, whence, start, length, no process.
_WHOLE_FILE = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


class LockOwner(NamedTuple):
    """What a lock file says of the process that holds it.

    Attributes:
        host: Host of the process.
        pid: Number of the process there.
        remote: URL of the copy that follows the run; `None` if there is none.
        uploading: Names of the snapshots that are being brought there.
    """

    host: str
    pid: int
    remote: str | None = None
    uploading: tuple[str, ...] = ()


class RunLock:
    """An advisory lock on a file in the run folder, held while this process lives.

    On Linux it belongs to the open file: nothing else in this process that opens and closes the file, such as a copy
    of the folder, drops it. A forked child, such as a data loader worker, closes the file at once, so it holds nothing
    when this process dies. Elsewhere, and on file systems without such locks, it is a POSIX record lock. The two refuse
    each other, and NFS carries both.

    A file system that refuses any lock is a warning.

    Args:
        path: File that is locked.
        patience: Seconds to wait for a process of this host, which may be on its way out.
        clock: Function that gives seconds.
        remedy: What to do where another process holds it.
    """

    def __init__(
        self,
        path: Path,
        *,
        patience: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        remedy: str = "let it end, or choose another directory for this run",
    ) -> None:
        self._path, self._patience, self._clock, self._remedy = path, patience, clock, remedy
        self._close: weakref.finalize[Any, Any] | None = None
        self._noting = threading.RLock()

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            RunExistsError: If somebody else holds it. The message names the process, if the file does.
            OSError: If the file cannot be opened.
        """
        path = self._path
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            # A folder that frees its own space must be one that can be opened.
            _logger.warning("%s cannot be made (%s); a second run in this folder would go unnoticed", path, error)
            return
        # Also where nobody releases it, such as a keeper that was dropped.
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._close.atexit = False  # threads that still write at the end hold it until the process is gone
        try:
            _refuse_if_held_here(self._descriptor, path)
            _locks[self] = self._descriptor
            self._take(self._clock() + self._patience)
        except BaseException:
            self.release()
            raise
        if self._is_in_place():
            self._write_owner()
        else:  # its folder was moved while it was waited for, with the run that was set aside
            self.release()
            self.acquire()

    def release(self) -> None:
        """Release the folder. A second call does nothing."""
        with self._noting:
            _locks.pop(self, None)
            if self._close is not None:
                self._close()

    def release_in_child(self) -> None:
        """As `release`, in a child that was just forked."""
        self._noting = threading.RLock()  # a thread of the parent, which is not here, may have been in it
        self.release()

    def note(self, remote: str, uploading: Sequence[str]) -> None:
        """Note, for those who look at the run, what its owner uploads. Any thread; does nothing after `release`.

        Args:
            remote: URL of the copy that follows the run.
            uploading: Names of the snapshots that are being brought there.
        """
        with self._noting:  # the descriptor of a file that was closed may be that of another one
            if self in _locks:
                self._write_owner(remote=remote, uploading=list(uploading))

    def _take(self, deadline: float) -> None:
        is_announced = False
        while (refusal := _refusal_of_lock(self._descriptor)) is not None:
            if refusal.errno not in _HELD:
                _logger.warning(
                    "%s: this file system has no locks (%s); a second run in this folder would go unnoticed",
                    self._path,
                    refusal,
                )
                return
            owner = os.pread(self._descriptor, _OWNER_BYTES, 0).decode(errors="replace")
            if self._clock() >= deadline or not _may_be_here(owner):
                raise RunExistsError(
                    f"{self._path.parent} is in use by another process ({owner or 'unknown'}); {self._remedy}"
                ) from refusal
            if not is_announced:
                _logger.warning("%s: waiting for another process (%s) to end", self._path.parent, owner or "unknown")
                is_announced = True
            time.sleep(_POLL_SECONDS)  # a lock that is waited for could not be given up after the patience

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._descriptor), self._path.stat())
        except FileNotFoundError:
            return False

    def _write_owner(self, **notes: Any) -> None:
        owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), **notes}).encode()
        written = 0
        with contextlib.suppress(OSError):  # for people, and a full disk must not be in the way of a lock
            try:
                written = os.pwrite(self._descriptor, owner, 0)
            finally:
                os.ftruncate(self._descriptor, written)


def read_owner(path: Path) -> LockOwner | None:
    """What a lock file says of the live process that holds it; `None` where none does, or none can be seen.

    **Rank-local**. The lock is not taken, not for a moment.
    """
    with contextlib.suppress(OSError, *SENSELESS):
        held = [descriptor for descriptor in list(_locks.values()) if _is_open_as(path, descriptor)]
        if held:  # to open and close the file would drop a POSIX lock of this process
            return _parse_owner(os.pread(held[0], _OWNER_BYTES, 0))
        with open_file(path) as file:
            if _is_locked(file.fileno()):
                return _parse_owner(file.read(_OWNER_BYTES))
    return None


def _is_open_as(path: Path, descriptor: int) -> bool:
    return os.path.samestat(path.lstat(), os.fstat(descriptor))


def _is_locked(descriptor: int) -> bool:
    if not hasattr(fcntl, "F_OFD_GETLK"):
        return False
    found = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _WHOLE_FILE)
    return bool(struct.unpack_from("h", found)[0] != fcntl.F_UNLCK)


def _parse_owner(content: bytes) -> LockOwner:
    # What was there before may be longer, and is cut off a moment later.
    owner, _ = json.JSONDecoder().raw_decode(content.decode())
    uploading, remote = owner.get("uploading", ()), owner.get("remote")
    return LockOwner(
        str(owner["host"]), int(owner["pid"]), None if remote is None else str(remote), tuple(map(str, uploading))
    )


def _refusal_of_lock(descriptor: int) -> OSError | None:
    """Lock an open file, without waiting; why not, if it cannot be."""
    try:
        if sys.platform == "linux" and hasattr(fcntl, "F_OFD_SETLK"):
            try:
                fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _WHOLE_FILE)
            except OSError as error:
                if error.errno in _HELD:
                    return error
            else:
                return None
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error
    return None


def _refuse_if_held_here(descriptor: int, path: Path) -> None:
    if any(os.path.sameopenfile(descriptor, held) for held in list(_locks.values())):
        raise RunExistsError(f"{path.parent} is open in this process already: close the keeper that has it")


def _may_be_here(owner: str) -> bool:
    """Whether the process that a lock file names runs on this host, as far as the file says anything."""
    try:
        return bool(json.loads(owner)["host"] == socket.gethostname())
    except (ValueError, LookupError, TypeError):
        return True


def _close_in_child() -> None:
    # A child shares the open files of its parent, and would hold the lock after the death of the parent.
    for lock in list(_locks):
        lock.release_in_child()


_locks: weakref.WeakKeyDictionary[RunLock, int] = weakref.WeakKeyDictionary()  # their descriptors
os.register_at_fork(after_in_child=_close_in_child)

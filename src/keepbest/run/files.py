"""The operations that change a run folder: each one small, and durable where it says so.

Everything that is written there goes through a `Files`, so that a test can stop, refuse or reorder any operation.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path
from types import TracebackType

from keepbest.user_code import Log

_logger = Log(__name__)
_HAND_OVER_BYTES = 1 << 25
# With these a file system says that it does not sync folders, rather than that it could not do so. 524 is what NFS of
# Linux says for ENOTSUP.
_FOLDERS_NOT_SYNCED = (
    errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.EISDIR, errno.EBADF, errno.EACCES,
    errno.EPERM, errno.EPROTO, errno.ENXIO, 524,
)  # fmt: skip


class DurableFile:
    """A file open for appending, whose bytes are safe after `sync`. Serves `torch.save` as its file object."""

    def __init__(self, path: Path, *, exclusive: bool) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_EXCL if exclusive else 0)
        self.path = path
        self._handed_over = self._written = 0
        self._descriptor = os.open(path, flags, 0o666)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write all of `data`; a short write is continued."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        self._written += size
        if self._written - self._handed_over >= _HAND_OVER_BYTES:
            self._hand_over()
        return size

    def read(self, size: int) -> bytes:
        """The first `size` bytes of the file, or all of them if there are fewer."""
        data = bytearray()
        while part := os.pread(self._descriptor, size - len(data), len(data)):
            data += part
        return bytes(data)

    def is_in_place(self, size: int) -> bool:
        """Whether this file is still the one at its path, and has this size."""
        held = os.fstat(self._descriptor)
        try:
            return held.st_size == size and os.path.samestat(held, self.path.stat())
        except (FileNotFoundError, NotADirectoryError):
            return False

    def flush(self) -> None:
        """Nothing is buffered; part of the protocol of a file object."""

    def sync(self) -> None:
        """Wait until the bytes and the length are on the disk."""
        os.fsync(self._descriptor)

    def truncate(self, size: int) -> None:
        """Cut the file to `size` bytes."""
        os.ftruncate(self._descriptor, size)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _hand_over(self) -> None:
        """Let the disk begin with what was written, so that `sync` does not wait for all of it."""
        start, self._handed_over = self._handed_over, self._written
        if not hasattr(os, "posix_fadvise"):  # not every system has it
            return
        # Linux begins to write what it is asked to forget.
        with contextlib.suppress(OSError):  # it is advice: without it `sync` waits longer, and reports what failed
            os.posix_fadvise(self._descriptor, start, self._written - start, os.POSIX_FADV_DONTNEED)

    def __enter__(self) -> DurableFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Files:
    """The file system of a run folder. All paths of one operation lie in the same run folder."""

    _folders_are_synced = True

    def create(self, path: Path) -> DurableFile:
        """A new file; it must not exist."""
        return DurableFile(path, exclusive=True)

    def append(self, path: Path) -> DurableFile:
        """A file that is made if it is missing, and written at its end."""
        return DurableFile(path, exclusive=False)

    def make_folder(self, path: Path) -> None:
        """A folder, durably, with those above it; it may exist."""
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            try:
                self.sync_folder(folder.parent)
            except OSError:
                with contextlib.suppress(OSError):  # the first refusal is the cause
                    folder.rmdir()  # so that the next call makes and syncs it
                raise

    def sync_file(self, path: Path) -> None:
        """Wait until the bytes of a file that is there, and that others wrote, are on the disk."""
        with self.append(path) as file:
            file.sync()

    def sync_folder(self, path: Path) -> None:
        """Wait until the entries of a folder are on the disk, where the file system does such a thing."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno not in _FOLDERS_NOT_SYNCED:
                raise
            if self._folders_are_synced:
                self._folders_are_synced = False
                _logger.warning(
                    "%s: this file system does not sync folders (%s); a power cut may take the newest files with it",
                    path,
                    error,
                )

    def rename(self, old: Path, new: Path) -> None:
        """Give `old` the name `new`, in one step; a file or link that has this name is replaced."""
        old.replace(new)

    def link(self, target: str, path: Path) -> None:
        """A symbolic link at `path`, which must not exist."""
        path.symlink_to(target)

    def remove(self, path: Path) -> None:
        """A file, a link or a whole folder; it may be missing."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            with contextlib.suppress(FileNotFoundError):  # removed is what it shall be
                path.unlink()

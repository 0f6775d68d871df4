"""A run folder may be from anybody: no link leads out of it, and only files are opened. **Rank-local**.

The directory of a run may be reached through links. Below it only refs are links, and nothing is read or written
through them.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from keepbest.errors import LedgerError, SnapshotError
from keepbest.run.layout import CHECKPOINTS, LEDGER, LOCK, SNAPSHOTS


def check_frame(directory: Path) -> None:
    """Check that what a run folder is made of is no link. What is missing is fine.

    Raises:
        LedgerError: If a folder is a link, or what should be a file is something else.
    """
    folder = directory / CHECKPOINTS
    for path in (folder, folder / SNAPSHOTS):
        if path.is_symlink():
            raise LedgerError(
                f"{_led_out(path)}. For another disk, let {directory} itself be the link, or choose it there"
            )
    for path in (folder / LOCK, folder / LEDGER):
        _check_is_file(path)


def check_own(path: Path) -> None:
    """Check that a file or folder that is about to be written in the directory of a run is no link there.

    Raises:
        SnapshotError: If it is one.
    """
    if path.is_symlink():
        raise SnapshotError(_led_out(path))


def open_file(path: Path) -> BinaryIO:
    """A file of a run, open for reading. It is no link, its folder is none, and it is no pipe and no device.

    Raises:
        OSError: If it is, or any refusal of the file system.
    """
    if path.parent.is_symlink():
        raise OSError(errno.ELOOP, _led_out(path.parent))
    # A pipe would wait for somebody who writes.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, f"{path} is no file")
    return file


def _check_is_file(path: Path) -> None:
    if path.is_symlink():
        raise LedgerError(_led_out(path))
    if path.exists() and not path.is_file():
        raise LedgerError(f"{path} is no file")


def _led_out(path: Path) -> str:
    return f"{path} is a link to {path.readlink()}; below the directory of a run only refs are links"

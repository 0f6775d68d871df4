"""What appears under its name in one step, when it is complete, such as an export. **Rank-local**.

It is written to a space, which is a hidden folder beside its place. A process has locked its space while it lives. So
the next one that writes to the same place can see which spaces were left by processes that were killed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

from keepbest.errors import ConfigError
from keepbest.run.files import Files
from keepbest.run.layout import TEMPORARY
from keepbest.user_code import Log

_logger = Log(__name__)


@contextlib.contextmanager
def appearing(path: Path, files: Files) -> Iterator[Path]:
    """Another path to write to; what was written there has the name `path` when the block has ended, and only then.

    Args:
        path: Path of a file.
        files: Operations that change the folder.

    Raises:
        ConfigError: If something has the name by then.
        OSError: Any refusal of the file system.
    """
    with made_for(path.parent), space_beside(path, files) as space:
        yield space / path.name
        name_all([space / path.name], path.parent, files)


def name_all(written: Sequence[Path], folder: Path, files: Files) -> list[Path]:
    """Move complete files of a space to `folder`, in this order, where none may have their names. Returns their paths.

    Raises:
        ConfigError: If something has one of the names. None of the files is there then.
        OSError: Any refusal of the file system. The same holds.
    """
    named: list[Path] = []
    try:
        for path in written:
            _name(path, folder / path.name, files)
            named.append(folder / path.name)
        files.sync_folder(folder)
    except BaseException:
        for path in named:
            files.remove(path)
        raise
    return named


@contextlib.contextmanager
def naming_alone(folder: Path) -> Iterator[None]:
    """Let nobody else name files in a folder during this block, where its file system has locks of folders.

    Raises:
        ConfigError: If somebody does.
    """
    lock, refusal = _lock(folder)
    if refusal == errno.EWOULDBLOCK:
        raise ConfigError(f"another export is about to appear in {folder}; nothing is overwritten")
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def space_beside(path: Path, files: Files) -> Iterator[Path]:
    """A folder beside `path` of this process alone, which is gone when the block has ended.

    Those for the same path that processes left which were killed are removed before. Another process, such as each rank
    of a training, may write to the same path at the same time. A warning names a folder that cannot be removed, as one
    of another user: what is written is complete without that.

    Raises:
        OSError: Any other refusal of the file system.
    """
    for left in path.parent.glob(f"{TEMPORARY}*"):
        if left.name.startswith(_prefix(path)) and left.is_dir() and not left.is_symlink():
            _remove_if_left(left, files)
    space, lock = _locked_space(path)
    try:
        yield space
    finally:
        try:
            _remove(space, files)
        finally:
            if lock is not None:
                os.close(lock)


@contextlib.contextmanager
def made_for(folder: Path) -> Iterator[None]:
    """Make a folder, and those above it, which are gone again if the block fails."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for each in missing:
            with contextlib.suppress(OSError):  # something else is in it by now
                each.rmdir()
        raise


def _prefix(path: Path) -> str:
    return f"{TEMPORARY}{path.name}."


def _locked_space(path: Path) -> tuple[Path, int | None]:
    """A new space, and the lock on it, until that is closed; `None` where the file system has no locks of folders."""
    while True:
        space = path.with_name(f"{_prefix(path)}{secrets.token_hex(4)}")
        space.mkdir()
        lock, refusal = _lock(space)
        if refusal == errno.EWOULDBLOCK or not space.exists():  # somebody has taken it for one that was left
            if lock is not None:
                os.close(lock)
            continue
        return space, lock


def _remove_if_left(space: Path, files: Files) -> None:
    # Without a lock it may be in use.
    lock, _ = _lock(space)
    if lock is not None:
        try:
            _remove(space, files)
        finally:
            os.close(lock)


def _remove(space: Path, files: Files) -> None:
    try:
        files.remove(space)
    except OSError as error:
        _logger.warning("%s is not used any more and cannot be removed: %s", space, error)


def _lock(space: Path) -> tuple[int | None, int | None]:
    """A lock on a folder, without waiting, or the reason why there is none."""
    descriptor = -1
    try:
        descriptor = os.open(space, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if descriptor >= 0:
            os.close(descriptor)
        return None, error.errno
    return descriptor, None


def _name(written: Path, path: Path, files: Files) -> None:
    """Give a file the name `path`, in one step, if nothing has it. Raises `ConfigError` if something has."""
    try:
        path.hardlink_to(written)
    except OSError as error:
        if os.path.lexists(path):
            raise ConfigError(f"{path} exists; nothing is overwritten") from error
        files.rename(written, path)  # a file system may know no second names

"""Disks that are small, or full, and file systems that lack what others have."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
import torch


@contextmanager
def mounted(*arguments: str, at: Path):
    """A mount that ends with the block; who may not mount skips the test."""
    at.mkdir(exist_ok=True)
    made = subprocess.run(["mount", *arguments, str(at)], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"needs the right to mount: {made.stderr.strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


@contextmanager
def bare_file_system() -> Iterator[None]:
    """While the block lasts, no file system has links, locks or maps of files, and none syncs folders."""
    fsync, map_anything = os.fsync, mmap.mmap

    def map_memory(descriptor: int, length: int, **settings: int) -> mmap.mmap:
        if descriptor != -1:
            refuse()
        return map_anything(descriptor, length, **settings)

    def sync_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refuse()
        fsync(descriptor)

    def refuse(*_arguments: object, **_settings: object) -> NoReturn:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", sync_files)
        patch.setattr(os, "symlink", refuse)
        patch.setattr(mmap, "mmap", map_memory)
        for module, names in ((fcntl, ("fcntl", "lockf")), (torch.UntypedStorage, ("from_file",))):
            for name in names:
                patch.setattr(module, name, refuse)
        yield


def fill(disk: Path) -> None:
    room = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(room.f_bavail * room.f_frsize))

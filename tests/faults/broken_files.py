"""A file layer that lets a test step in before every operation of the store, and refuse it."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from keepbest.run import record as store
from keepbest.run.files import DurableFile, Files

OPERATIONS = (
    "create", "append", "write", "sync", "close", "truncate", "rename", "sync_folder", "link", "remove",
)  # fmt: skip
Step = Callable[[str], None]


class SteppedFile(DurableFile):
    def __init__(self, path: Path, *, exclusive: bool, before: Step) -> None:
        super().__init__(path, exclusive=exclusive)
        self._before = before

    def write(self, data):
        try:
            self._before("write")
        except OSError:
            super().write(memoryview(data).cast("B")[: len(data) // 2])  # as a disk that fills up in the middle
            raise
        return super().write(data)

    def sync(self):
        self._before("sync")
        super().sync()

    def truncate(self, size):
        self._before("truncate")
        super().truncate(size)

    def close(self):
        was_open = self._descriptor >= 0
        super().close()
        if was_open:
            self._before("close")


class SteppedFiles(Files):
    """Calls `before(operation)` first; an `OSError` that it raises is the answer of the file system."""

    def __init__(self, before: Step) -> None:
        self._before = before

    def create(self, path):
        self._before("create")
        return SteppedFile(path, exclusive=True, before=self._before)

    def append(self, path):
        self._before("append")
        return SteppedFile(path, exclusive=False, before=self._before)

    def sync_folder(self, path):
        self._before("sync_folder")
        super().sync_folder(path)

    def rename(self, old, new):
        self._before("rename")
        super().rename(old, new)

    def link(self, target, path):
        self._before("link")
        super().link(target, path)

    def remove(self, path):
        self._before("remove")
        super().remove(path)


class Fault:
    """Refuses the calls number `first` to `last` of one operation; counts all calls of all operations.

    `sync+truncate` refuses `sync`, and while it does so `truncate` too.
    """

    def __init__(self, operation: str = "", first: int = 0, last: int = 0, error: int = errno.EIO) -> None:
        self.first, self.last, self.error = first, last, error
        self.aim(operation)
        self.calls: Counter[str] = Counter()
        self.refused = 0

    def __call__(self, operation: str) -> None:
        self.calls[operation] += 1
        if operation in self.refuses and self.first <= self.calls[self.refuses[0]] <= self.last:
            self.refused += 1
            raise OSError(self.error, os.strerror(self.error))

    def aim(self, operation: str) -> None:
        self.refuses = operation.split("+")

    def mend(self) -> None:
        self.last = 0


def install(patch: pytest.MonkeyPatch, before: Step) -> None:
    """Every store that this process opens from now on has the stepped file layer."""
    patch.setattr(store, "Files", lambda: SteppedFiles(before))

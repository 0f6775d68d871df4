"""A file layer that hands every operation to a step, which does it, refuses it, waits with it, or dies in it.

    files = SteppedFiles(before(fault))        # `fault(operation)` comes first, and may raise an OSError
    with use(directory, files=files):          # of `tests.kit.seams`
        ...

A step is called with the `Operation` and answers for it. `Operation.do` is the real file system.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepbest.run.files import DurableFile, Files

OPERATIONS = (
    "create", "append", "write", "sync", "close", "truncate", "make_folder", "sync_folder", "rename", "link", "remove",
)  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """One operation that is about to be done.

    Attributes:
        name: One of `OPERATIONS`.
        path: The file, folder or link that it makes or changes.
        do: Does it on the real file system.
        do_half: Does as much of it as there may be where it stops in the middle.
        data: The bytes of a write.
        size: The size that a file is cut to.
        old: The name that a rename takes away.
        target: The path that a link is for.
    """

    name: str
    path: Path
    do: Callable[[], Any]
    do_half: Callable[[], object] = lambda: None
    data: bytes | memoryview = b""
    size: int = 0
    old: Path = Path()
    target: str = ""


Step = Callable[[Operation], Any]


class SteppedFile(DurableFile):
    """A file of `SteppedFiles`."""

    def __init__(self, path: Path, step: Step, *, exclusive: bool) -> None:
        super().__init__(path, exclusive=exclusive)
        self._step = step

    def write(self, data):
        write, view = super().write, memoryview(data).cast("B")
        half = view[: len(view) // 2]
        return self._step(Operation("write", self.path, lambda: write(view), lambda: write(half), data=view))

    def sync(self):
        self._step(Operation("sync", self.path, super().sync))

    def truncate(self, size):
        truncate = super().truncate
        self._step(Operation("truncate", self.path, lambda: truncate(size), size=size))

    def close(self):
        if self._descriptor >= 0:
            self._step(Operation("close", self.path, super().close, super().close))


class SteppedFiles(Files):
    """The real file system, with a step in the way of each operation."""

    def __init__(self, step: Step) -> None:
        self._step = step

    def create(self, path):
        return self._step(Operation("create", path, lambda: SteppedFile(path, self._step, exclusive=True)))

    def append(self, path):
        return self._step(Operation("append", path, lambda: SteppedFile(path, self._step, exclusive=False)))

    def make_folder(self, path):
        make_folder = super().make_folder
        self._step(Operation("make_folder", path, lambda: make_folder(path)))

    def sync_folder(self, path):
        sync_folder = super().sync_folder
        self._step(Operation("sync_folder", path, lambda: sync_folder(path)))

    def rename(self, old, new):
        rename = super().rename
        self._step(Operation("rename", new, lambda: rename(old, new), old=old))

    def link(self, target, path):
        link = super().link
        self._step(Operation("link", path, lambda: link(target, path), target=target))

    def remove(self, path):
        remove = super().remove
        self._step(Operation("remove", path, lambda: remove(path), lambda: _remove_a_file_in(path)))


def _remove_a_file_in(folder: Path) -> None:
    """What is there in the middle of the removal of a folder."""
    if not folder.is_symlink():
        for file in sorted(path for path in folder.rglob("*") if path.is_file())[:1]:
            file.unlink()


def before(look: Callable[[Operation], object]) -> Step:
    """A step that calls `look` first; what that refuses is half done, as on a disk that fills up in the middle."""

    def step(operation: Operation) -> Any:
        try:
            look(operation)
        except OSError:
            operation.do_half()
            raise
        return operation.do()

    return step


def without_waiting(operation: Operation) -> Any:
    """A step for tests that cut nothing off: nobody waits for the disk."""
    return None if operation.name in ("sync", "sync_folder") else operation.do()


class Fault:
    """Refuses the calls number `first` to `last` of one operation; counts all calls of all operations.

    `sync+truncate` refuses `sync`, and while it does so `truncate` too.
    """

    def __init__(self, operation: str = "", first: int = 0, last: int = 0, error: int = errno.EIO) -> None:
        self.first, self.last, self.error = first, last, error
        self.aim(operation)
        self.calls: Counter[str] = Counter()
        self.refused = 0

    def __call__(self, operation: Operation) -> None:
        self.calls[operation.name] += 1
        if operation.name in self.refuses and self.first <= self.calls[self.refuses[0]] <= self.last:
            self.refused += 1
            raise OSError(self.error, os.strerror(self.error))

    def aim(self, operation: str) -> None:
        self.refuses = operation.split("+")

    def end(self) -> None:
        self.last = 0

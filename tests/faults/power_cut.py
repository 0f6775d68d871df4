"""A file system that can lose what was not synced: records what a store does, and builds what a power cut may leave.

Effects on the bytes of a file are safe after its `sync`; effects on the entries of a folder after its `sync_folder`.
Any other effect may be lost, each on its own, in any combination; of a write, only a part may be there.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.kit.files import Operation, SteppedFiles

ALL_SUBSETS_UP_TO = 8
SUBSETS_ABOVE = 256

KEPT, LOST, TORN = "kept", "lost", "torn"


@dataclass
class Write:
    inode: int
    offset: int
    data: bytes


@dataclass
class Truncate:
    inode: int
    size: int


@dataclass
class Enter:
    """`name` in the folder becomes `entry`, in one step; with `old`, that name goes."""

    inode: int
    name: str
    entry: int
    old: str | None = None


@dataclass
class Leave:
    inode: int
    name: str


@dataclass
class Sync:
    inode: int


@dataclass
class Disk:
    """What is on the disk, by inode: bytes of files, entries of folders, targets of links."""

    files: dict[int, bytearray] = field(default_factory=dict)
    folders: dict[int, dict[str, int]] = field(default_factory=dict)
    links: dict[int, str] = field(default_factory=dict)

    def apply(self, effect: Write | Truncate | Enter | Leave, fate: str) -> None:
        if isinstance(effect, Write):
            data = effect.data if fate == KEPT else effect.data[: len(effect.data) // 2]
            content = self.files.setdefault(effect.inode, bytearray())
            content.extend(bytes(max(0, effect.offset - len(content))))
            content[effect.offset : effect.offset + len(data)] = data
        elif isinstance(effect, Truncate):
            del self.files.setdefault(effect.inode, bytearray())[effect.size :]
        elif isinstance(effect, Enter):
            entries = self.folders.setdefault(effect.inode, {})
            entries.pop(effect.old, None)
            entries[effect.name] = effect.entry
        else:
            self.folders.setdefault(effect.inode, {}).pop(effect.name, None)

    def describe(self, inode: int) -> object:
        """All that can be reached from a folder, as something hashable."""
        if inode in self.links:
            return self.links[inode]
        if inode in self.files:
            return bytes(self.files[inode])
        return tuple(sorted((name, self.describe(entry)) for name, entry in self.folders.get(inode, {}).items()))

    def build(self, inode: int, path: Path) -> None:
        """Make the folder `inode` for real at `path`."""
        path.mkdir(parents=True)
        for name, entry in self.folders.get(inode, {}).items():
            if entry in self.links:
                (path / name).symlink_to(self.links[entry])
            elif entry in self.files:
                (path / name).write_bytes(self.files[entry])
            else:
                self.build(entry, path / name)


class RecordingFiles(SteppedFiles):
    """Does everything for real below `root`, without waiting for the disk, and writes down what it did."""

    ROOT = 0

    def __init__(self, root: Path) -> None:
        super().__init__(self._record)
        self.root = root
        self.log: list[Write | Truncate | Enter | Leave | Sync] = []
        self.disk = Disk(folders={self.ROOT: {}})
        self._numbers = itertools.count(1)

    def inode_of(self, path: Path) -> int:
        inode = self.ROOT
        for name in path.relative_to(self.root).parts:
            inode = self.disk.folders[inode][name]
        return inode

    def sync_file(self, path: Path) -> None:
        """Of a file that torch wrote past the layer nothing is known before: none of it is safe until now."""
        if path.name not in self.disk.folders[self.inode_of(path.parent)]:
            inode = next(self._numbers)
            self.disk.files[inode] = bytearray()
            self._enter(path, inode)
            self.log.append(Write(inode, 0, path.read_bytes()))
        super().sync_file(path)

    def _record(self, operation: Operation) -> Any:
        """The step of each operation: by its name, before or instead of it."""
        write_down = getattr(self, f"_{operation.name}", None)
        if write_down is not None:
            write_down(operation)
        return operation.do() if operation.name not in ("sync", "sync_folder", "make_folder") else None

    def _enter(self, path: Path, entry: int, old: str | None = None) -> None:
        effect = Enter(self.inode_of(path.parent), path.name, entry, old)
        self.log.append(effect)
        self.disk.apply(effect, KEPT)

    def _create(self, operation: Operation) -> None:
        inode = next(self._numbers)
        self.disk.files[inode] = bytearray()
        self._enter(operation.path, inode)

    def _append(self, operation: Operation) -> None:
        if not operation.path.exists():
            self._create(operation)

    def _write(self, operation: Operation) -> None:
        offset = operation.path.stat().st_size
        self.log.append(Write(self.inode_of(operation.path), offset, bytes(operation.data)))

    def _truncate(self, operation: Operation) -> None:
        if operation.path.stat().st_size != operation.size:
            self.log.append(Truncate(self.inode_of(operation.path), operation.size))

    def _sync(self, operation: Operation) -> None:
        self.log.append(Sync(self.inode_of(operation.path)))

    _sync_folder = _sync

    def _make_folder(self, operation: Operation) -> None:
        for folder in reversed([operation.path, *operation.path.parents]):
            if folder.is_relative_to(self.root) and not folder.exists():
                folder.mkdir()
                inode = next(self._numbers)
                self.disk.folders[inode] = {}
                self._enter(folder, inode)
                self.sync_folder(folder.parent)

    def _rename(self, operation: Operation) -> None:
        self._enter(operation.path, self.inode_of(operation.old), operation.old.name)

    def _link(self, operation: Operation) -> None:
        inode = next(self._numbers)
        self.disk.links[inode] = operation.target
        self._enter(operation.path, inode)

    def _remove(self, operation: Operation) -> None:
        if os.path.lexists(operation.path):
            self._leave(operation.path)

    def _leave(self, path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            for child in sorted(path.iterdir()):
                self._leave(child)
        effect = Leave(self.inode_of(path.parent), path.name)
        self.log.append(effect)
        self.disk.apply(effect, KEPT)

    def unsynced(self, length: int) -> list[int]:
        """Numbers of the effects among the first `length` that a power cut after them may take."""
        pending: list[int] = []
        for number, effect in enumerate(self.log[:length]):
            if isinstance(effect, Sync):
                pending = [earlier for earlier in pending if self.log[earlier].inode != effect.inode]
            else:
                pending.append(number)
        return pending

    def after_power_cut(self, length: int, fates: dict[int, str]) -> Disk:
        """The disk after the first `length` operations, of which some had another fate than to be kept."""
        disk = Disk(
            files={inode: bytearray() for inode in self.disk.files},
            folders={inode: {} for inode in self.disk.folders},
            links=self.disk.links,
        )
        for number, effect in enumerate(self.log[:length]):
            fate = fates.get(number, KEPT)
            if not isinstance(effect, Sync) and fate != LOST:
                disk.apply(effect, fate)
        return disk

    def fates(self, length: int, chance: random.Random, *, most: int | None = None) -> Iterator[dict[int, str]]:
        """What may have become of the effects that were not synced: every subset lost, or random ones of many.

        Args:
            length: of the prefix.
            chance: for the random ones, and for parts of writes.
            most: draw at most so many instead.
        """
        pending = self.unsynced(length)
        writes = [number for number in pending if isinstance(self.log[number], Write)]
        yield {}
        yield dict.fromkeys(pending, LOST)
        if len(pending) <= ALL_SUBSETS_UP_TO and most is None:
            for count in range(1, len(pending)):
                for lost in itertools.combinations(pending, count):
                    yield dict.fromkeys(lost, LOST)
        elif pending:
            for _ in range(most or SUBSETS_ABOVE):
                yield {number: chance.choice([LOST, TORN, KEPT]) for number in pending}
        for number in writes if most is None else writes[-1:]:
            yield {number: TORN}

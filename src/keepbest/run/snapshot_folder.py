"""The folder of snapshots: each written once, complete when it has its name, never changed after."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Collection
from functools import partial
from pathlib import Path

from keepbest.errors import ConfigError
from keepbest.iteration import TrainingIteration
from keepbest.run.files import Files
from keepbest.run.layout import MANIFEST, TEMPORARY, is_of_system, unfinished_folder
from keepbest.run.lines import SENSELESS
from keepbest.run.manifest import Manifest, manifest_digest
from keepbest.run.no_links import open_file
from keepbest.user_code import Log
from keepbest.worker import Threaded

_logger = Log(__name__)
_REMOVED = f"{TEMPORARY}removed-"


def unfinished_snapshots(path: Path) -> dict[str, int]:
    """The bytes that are there of each snapshot that is being written in a folder of snapshots, by its name.

    It is rank-local, and may be called while they appear and disappear. Links are not followed.
    """
    found = {}
    for folder in sorted(path.glob(f"{TEMPORARY}*")):
        if not folder.name.startswith(_REMOVED) and not folder.is_symlink():
            found[folder.name.removeprefix(TEMPORARY)] = _bytes_in(folder)
    return found


def _bytes_in(folder: Path) -> int:
    size = 0
    for inside, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # the snapshot is complete by now, and has its name
                size += os.lstat(f"{inside}/{name}").st_size
    return size


class SnapshotFolder:
    """`<run>/checkpoints/snapshots`. **Rank-local**, on rank 0."""

    def __init__(self, files: Files, path: Path) -> None:
        self._files = files
        self._path = path
        self._given: set[str] = set()
        self._swept: set[str] | None = None  # all that is there, where that was needed the last time
        self._removal: Threaded | None = None

    def holds(self, name: str) -> bool:
        """Whether there is a snapshot of this name."""
        return (self._path / name).is_dir()

    def names(self) -> set[str]:
        """The names of all complete snapshots, whether the ledger knows them or not."""
        there = (path for path in self._path.iterdir() if not is_of_system(path))
        return {path.name for path in there if not path.name.startswith(TEMPORARY)}

    def ledger_bytes(self, name: str) -> int:
        """The bytes that the ledger had at least when this snapshot was complete; 0 if it does not say."""
        try:
            with open_file(self._path / name / MANIFEST) as file:
                return Manifest.from_bytes(file.read()).ledger_bytes
        except (OSError, *SENSELESS):
            return 0

    def new_name(self, iteration: TrainingIteration, restarts: int, selection: str, known: Collection[str]) -> str:
        """A name that no snapshot has or had.

        Args:
            iteration: Training iteration of the snapshot, which begins the name.
            restarts: Number of restarts of the run; follows where it is not 0.
            selection: What is saved; a hash of it follows where another selection has the name.
            known: Names that the ledger knows.
        """
        plain = f"{iteration}.r{restarts}" if restarts else str(iteration)
        selected = f"{plain}.{hashlib.blake2b(selection.encode(), digest_size=4).hexdigest()}"
        candidates = itertools.chain([plain, selected], (f"{selected}.{number}" for number in itertools.count(2)))
        taken = {*known, *self._given}
        name = next(name for name in candidates if name not in taken and not self.holds(name))
        self._given.add(name)
        return name

    def begin(self, name: str) -> None:
        """Make the empty folder for the files of a snapshot. Raises `OSError`."""
        self.finish_removal()  # it may be the space that this needs
        self._swept = None
        self._files.make_folder(unfinished_folder(self._path, name))

    def publish(self, name: str, manifest: Manifest) -> str:
        """Complete a snapshot whose files are on the disk: write its manifest and give it its name, durably.

        Returns:
            The digest of the manifest.

        Raises:
            OSError: Any refusal of the file system. The caller drops the snapshot then.
        """
        files, temporary, text = self._files, unfinished_folder(self._path, name), manifest.to_bytes()
        with files.create(temporary / MANIFEST) as file:
            file.write(text)
            file.sync()
        files.sync_folder(temporary)
        files.rename(temporary, self._path / name)
        files.sync_folder(self._path)
        return manifest_digest(text)

    def drop(self, name: str) -> None:
        """Remove what there is of a snapshot that could not be committed.

        What is refused stays until the next commit: the caller is about to raise the error that came before.
        """
        with contextlib.suppress(OSError):  # the first refusal is the cause; the next commit removes the rest
            self._files.remove(unfinished_folder(self._path, name))
            self._files.remove(self._path / name)

    def remove_all_but(self, kept: Collection[str]) -> None:
        """Remove everything that is not in `kept`, also what a crash left half written.

        All of it loses its name at once. A thread frees the space, if one can be started: for large files that takes as
        long as a part of the write, and only the next write needs to wait for it.

        Raises:
            OSError: Any refusal of the file system.
        """
        if self._swept is not None and self._swept.issubset(kept):
            return
        self.finish_removal()
        self._swept = None
        there = [path for path in self._path.iterdir() if not is_of_system(path)]
        removed = [self._without_name(path) for path in there if path.name not in kept]
        if not removed:
            self._swept = {path.name for path in there}
        else:
            try:
                removal = self._removal = Threaded("keepbest-removal")
            except ConfigError:  # too many threads, or the interpreter is about to exit
                self._remove(removed)
            else:
                removal.submit(partial(self._remove, removed), _report)
                removal.close(timeout=0)  # it ends when that is done

    def finish_removal(self) -> None:
        """Wait until the space of all that was removed is free."""
        removal = self._removal
        if removal is not None:
            removal.close()
            self._removal = None

    def _without_name(self, path: Path) -> Path:
        if path.name.startswith(TEMPORARY):
            return path
        nameless = path.with_name(f"{_REMOVED}{path.name}")
        self._files.rename(path, nameless)
        return nameless

    def _remove(self, paths: list[Path]) -> None:
        try:
            for path in paths:
                self._files.remove(path)
        except OSError as error:
            _logger.warning("snapshots that are no longer needed stay until the next save: %s", error)


def _report(error: BaseException) -> None:
    _logger.error("snapshots that are no longer needed could not be removed", exc_info=error)

"""The folder of snapshots: each written once, complete when it has its name, never changed after."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from keepbest.capture.gathered import Weights
from keepbest.errors import SnapshotError
from keepbest.formats.format import FILE_FORMATS
from keepbest.iteration import TrainingIteration
from keepbest.run.files import Files
from keepbest.run.layout import MANIFEST, TEMPORARY
from keepbest.run.names import part_name

_logger = logging.getLogger(__name__)
_REMOVED = f"{TEMPORARY}removed-"


def manifest_digest(text: bytes) -> str:
    """Digest of a manifest, as the ledger records it."""
    return hashlib.blake2b(text, digest_size=16).hexdigest()


class ShardFolder(NamedTuple):
    """A folder that all ranks write a snapshot into.

    Attributes:
        snapshot: name that it will have.
        temporary: name that it has until it is complete.
        token: name of an empty file in it, which shows a rank that it sees the same folder as rank 0.
    """

    snapshot: str
    temporary: str
    token: str


class SnapshotFolder:
    """`<run>/checkpoints/snapshots`. **Rank-local**, on rank 0."""

    def __init__(self, files: Files, path: Path) -> None:
        self._files = files
        self._path = path
        self._removal: threading.Thread | None = None

    def holds(self, name: str) -> bool:
        """Whether there is a snapshot of this name."""
        return (self._path / name).is_dir()

    def names(self) -> set[str]:
        """Of all snapshots that have their name, whether the ledger knows them or not."""
        return {path.name for path in self._path.iterdir() if not path.name.startswith(TEMPORARY)}

    def free_name(self, iteration: TrainingIteration, restarts: int, selection: str) -> str:
        """A name for a snapshot of `iteration`: after a restart, or where another selection has it, with a suffix.

        Raises:
            SnapshotError: if all of them are taken.
        """
        name = f"{iteration}.r{restarts}" if restarts else str(iteration)
        if self.holds(name):
            name = f"{name}.{hashlib.blake2b(selection.encode(), digest_size=4).hexdigest()}"
        if self.holds(name):
            raise SnapshotError(f"{self._path / name} exists already; a snapshot is never written to again")
        return name

    def write(self, name: str, weights: Weights, about: Mapping[str, Any], *, file_format: str) -> str:
        """Write a snapshot durably.

        Args:
            name: of the snapshot.
            weights: one file for each part.
            about: what else the manifest says.
            file_format: of the files, one of `FILE_FORMATS`.

        Returns:
            The digest of the manifest.

        Raises:
            OSError: whatever the file system answers; nothing of the snapshot is left then, if it can be removed.
        """
        ending, write, _ = FILE_FORMATS[file_format]
        with self._undone_if_refused(name):
            temporary = self.begin(name)
            written = {
                f"{part_name(part)}{ending}": {
                    "part": part,
                    **write(self._files, temporary / f"{part_name(part)}{ending}", state),
                }
                for part, state in weights.files.items()
            }
            return self.publish(name, weights, written, about)

    def begin(self, name: str) -> Path:
        """An empty folder for the files of a snapshot, until `publish` gives it its name. Raises `OSError`."""
        self.finish_removal()  # it may be the space that this needs
        temporary = self._temporary(name)
        self._files.remove(temporary)
        self._files.make_folder(temporary)
        return temporary

    def publish(self, name: str, weights: Weights, written: Mapping[str, Any], about: Mapping[str, Any]) -> str:
        """Complete a snapshot whose files are on the disk: write its manifest and give it its name, durably.

        Args:
            name: of the snapshot.
            weights: that were written.
            written: for the name of each file in the folder what is recorded of it.
            about: what else the manifest says.

        Returns:
            The digest of the manifest.

        Raises:
            OSError: whatever the file system answers; nothing of the snapshot is left then, if it can be removed.
        """
        files, temporary = self._files, self._temporary(name)
        with self._undone_if_refused(name):
            size = sum(entry["bytes"] for entry in written.values())
            parts = [(part.name, part.path, part.apart) for part in weights.parts]
            manifest = {**about, "bytes": size, "parts": parts, "files": written, "left_out": weights.left_out}
            text = json.dumps(manifest, indent=1).encode()
            with files.create(temporary / MANIFEST) as file:
                file.write(text)
                file.sync()
            files.sync_folder(temporary)
            files.rename(temporary, self._path / name)
            files.sync_folder(self._path)
        return manifest_digest(text)

    @contextlib.contextmanager
    def _undone_if_refused(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError:
            with contextlib.suppress(OSError):  # the first refusal is the cause; the next commit removes the rest
                self._files.remove(self._temporary(name))
                self._files.remove(self._path / name)
            raise

    def _temporary(self, name: str) -> Path:
        return self._path / f"{TEMPORARY}{name}"

    def remove(self, name: str) -> None:
        """Remove one snapshot."""
        self._files.remove(self._path / name)

    def remove_all_but(self, kept: Collection[str]) -> None:
        """Remove whatever is not in `kept`, what a crash left half written included.

        All of it loses its name at once. A thread gives back the space: for large files that takes as long as a part of
        the write, and nothing needs to wait for it but the next write.

        Raises:
            OSError: whatever the file system answers.
        """
        self.finish_removal()
        doomed = [path for path in self._path.iterdir() if path.name not in kept]
        removed = [self._without_name(path) for path in doomed]
        if removed:
            self._removal = threading.Thread(target=self._remove, args=(removed,), name="keepbest-removal", daemon=True)
            self._removal.start()

    def finish_removal(self) -> None:
        """Wait until the space of all that was removed is free."""
        if self._removal is not None:
            self._removal.join()
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
            _logger.warning("what is no longer needed stays until the next save: %s", error)

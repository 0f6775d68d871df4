"""Reading a run folder without owning it: the history, and the manifest of a snapshot. **Rank-local**."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from keepbest.errors import ConfigError, SnapshotError
from keepbest.run.digest import check_file
from keepbest.run.events import Event
from keepbest.run.history import History
from keepbest.run.layout import MANIFEST, ledger_path, snapshots_folder
from keepbest.run.ledger import read_ledger
from keepbest.run.manifest import Manifest, manifest_digest
from keepbest.run.no_links import check_frame, open_file
from keepbest.run.place import why_no_run


class FoundSnapshot(NamedTuple):
    """A snapshot on the disk: its folder, and its manifest, which is the one that the ledger recorded."""

    folder: Path
    manifest: Manifest

    def check_files(self, share: int = 0, shares: int = 1, *, parts: Container[str] | None = None) -> None:
        """Compare one of so many shares of the files, or of those of `parts`, with what was written.

        Raises:
            SnapshotError: If one of them is missing or damaged.
        """
        files = sorted(self.manifest.files) if parts is None else self.manifest.files_in(parts)
        for name in files[share::shares]:
            check_file(self.folder / name, self.manifest.files[name].digest)

    def check_before_use(self, share: int = 0, shares: int = 1, *, parts: Container[str] | None = None) -> None:
        """As `check_files`, with errors that say what can be done."""
        with _advising(self.folder):
            self.check_files(share, shares, parts=parts)


@contextmanager
def _advising(folder: Path) -> Iterator[None]:
    """Let errors of the snapshot in `folder` say what can be done, for somebody who wants to use it."""
    try:
        yield
    except SnapshotError as error:
        directory = folder.parents[2]
        raise SnapshotError(
            f"{error}. Load another ref (python -m keepbest show {directory}), or this one from a copy of the run, as "
            "at the URL of a remote one; from that, a resume brings back a snapshot whose folder was removed. What "
            f"else is damaged: python -m keepbest verify {directory}"
        ) from error


def read_history(directory: Path) -> History:
    """What the ledger of the run in `directory` records. Raises as `read_events`."""
    return History.of(read_events(directory), ledger_path(directory))


def is_best_of_its_run(path: Path) -> bool:
    """Whether the snapshot in the folder `path` is the best that a keeper of its run has ever saved.

    Raises:
        SnapshotError: If it is in no run.
        LedgerError: If the ledger is damaged or of another version.
    """
    history = read_history(path.parents[2])
    return any(history.refs.get(keeper) == path.name for keeper in history.keepers)


def read_events(directory: Path) -> list[Event]:
    """The events in the ledger of the run in `directory`.

    Raises:
        SnapshotError: If there is no ledger. The message says what to give instead, where that can be seen.
        LedgerError: If it is damaged or of another version, or the folder is made of links.
    """
    try:
        check_frame(directory)
        events, _ = read_ledger(ledger_path(directory))
    except NotADirectoryError:
        events = []
    if not events:
        raise SnapshotError(why_no_run(directory))
    return events


def only_best(run: str | Path, history: History) -> str:
    """The ref on the best of `run`, which monitors one metric. Raises `ConfigError` if it has none yet, or several."""
    bests = bests_of(history)
    if len(bests) != 1:
        known = ", ".join(sorted(history.refs)) or "none yet"
        raise ConfigError(f"{run} has {len(bests)} best checkpoints; say which ref is meant: {known}")
    return bests[0]


def bests_of(history: History) -> list[str]:
    """The refs on the best of each metric that is kept."""
    return [name for name in history.keepers if name in history.refs]


def find_ref(directory: Path, history: History, ref: str) -> FoundSnapshot:
    """The snapshot that `ref` names.

    Raises:
        SnapshotError: If there is no such ref (the message lists those that exist), or the manifest is missing or
            damaged (the message says what can be done).
    """
    if ref not in history.refs:
        known = ", ".join(sorted(history.refs)) or "none yet"
        raise SnapshotError(f"{directory} has no ref {ref!r}; there are: {known}")
    with _advising(snapshots_folder(directory) / history.refs[ref]):
        return find_snapshot(directory, history, history.refs[ref])


def find_snapshot(directory: Path, history: History, snapshot: str) -> FoundSnapshot:
    """The snapshot of this name. Raises `SnapshotError` if its manifest is missing or damaged."""
    folder = snapshots_folder(directory) / snapshot
    return FoundSnapshot(folder, read_manifest(folder, history.manifests.get(snapshot)))


def read_manifest(folder: Path, digest: str | None) -> Manifest:
    """The manifest in the folder of a snapshot.

    Args:
        folder: Folder of the snapshot.
        digest: Digest by which the ledger knows the manifest.

    Raises:
        SnapshotError: If the manifest is missing, damaged, or of another version.
    """
    try:
        with open_file(folder / MANIFEST) as file:
            text = file.read()
    except OSError as error:
        raise SnapshotError(f"snapshot {folder.name} cannot be read: {error}") from error
    if manifest_digest(text) != digest:
        raise SnapshotError(f"{folder / MANIFEST} is damaged: it is not what the ledger recorded")
    try:
        return Manifest.from_bytes(text)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise SnapshotError(f"{folder / MANIFEST} makes no sense: {error!r}") from error

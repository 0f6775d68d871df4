"""Compares a run folder with its ledger, and every file with what was written. **Rank-local**."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from keepbest.errors import SnapshotError
from keepbest.run.digest import check_file
from keepbest.run.files import Files
from keepbest.run.history import History
from keepbest.run.layout import CHECKPOINTS, LEDGER, LOCK, MANIFEST, SNAPSHOTS, TEMPORARY, is_of_system, ref_paths
from keepbest.run.ledger import read_ledger
from keepbest.run.lock import read_owner
from keepbest.run.lost_ledger import describe_unknown, unknown_snapshots
from keepbest.run.reader import FoundSnapshot, find_snapshot, read_history, read_manifest
from keepbest.run.ref_links import RefLinks
from keepbest.run.snapshot_folder import SnapshotFolder


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is not as the ledger says.

    Attributes:
        kind: "damage" is lost for good; "unfinished" is what a crash left, and the next resume or `repair` finishes.
        message: What was found, and where.
    """

    kind: Literal["damage", "unfinished"]
    message: str


def verify(directory: Path) -> list[Fault]:
    """Everything that is wrong with the run in `directory`; reads every byte that a ref, a pin or a best needs.

    What is unfinished counts only where no live process works in the run.

    Raises:
        SnapshotError: If there is no run.
        LedgerError: If the ledger is damaged or of another version: then nothing else can be checked.
    """
    history = read_history(directory)
    folder = directory / CHECKPOINTS
    was_live = read_owner(folder / LOCK) is not None
    faults = [
        *_ledger_faults(folder / LEDGER),
        *_ref_faults(directory, history),
        *(fault for name in sorted(history.kept()) for fault in _faults_of_kept(directory, history, name)),
        *_leftovers(folder, history),
    ]
    # What a live process has begun, it may finish. And its ledger may be newer than the one that was read.
    if was_live or read_owner(folder / LOCK) is not None:
        return [fault for fault in faults if fault.kind == "damage"]
    if unknown := _unknown_snapshots(folder, history):
        damage = [fault for fault in faults if fault.kind == "damage"]  # nothing is finished in such a folder
        return [Fault("damage", describe_unknown(folder, unknown)), *damage]
    return faults


def _unknown_snapshots(folder: Path, history: History) -> set[str]:
    if not (folder / SNAPSHOTS).exists():
        return set()
    snapshots, links = SnapshotFolder(Files(), folder / SNAPSHOTS), RefLinks(Files(), folder)
    return unknown_snapshots(snapshots, links, history, read_ledger(folder / LEDGER)[1])


def _ledger_faults(path: Path) -> list[Fault]:
    _, whole = read_ledger(path)
    torn = path.stat().st_size - whole
    return [Fault("unfinished", f"{path}: the last line was torn off; {torn} bytes of it are left")] if torn else []


def _ref_faults(directory: Path, history: History) -> list[Fault]:
    folder = directory / CHECKPOINTS
    faults = []
    # A file system that refuses links has none of them.
    has_links = any(path.is_symlink() for path in ref_paths(folder))
    for name, snapshot in sorted(history.refs.items()):
        path = folder / name
        if path.is_symlink():
            if (target := path.readlink()) != Path(f"{SNAPSHOTS}/{snapshot}"):
                message = f"{path} points at {target}, the ledger says {SNAPSHOTS}/{snapshot}"
                faults.append(Fault("unfinished", message))
        elif not path.exists():
            if has_links:
                faults.append(Fault("unfinished", f"{path} is missing, the ledger says {SNAPSHOTS}/{snapshot}"))
        elif (difference := _difference_of_copy(path, history.manifests[snapshot])) is not None:
            message = f"{path} is no link, and no copy of {SNAPSHOTS}/{snapshot}, as the ledger says: {difference}"
            faults.append(Fault("unfinished", message))
    unknown = sorted({path.name for path in ref_paths(folder)} - history.refs.keys())
    return [
        *faults,
        *(Fault("unfinished", f"{folder / name} is a ref that the ledger does not know") for name in unknown),
    ]


def _difference_of_copy(path: Path, digest: str) -> str | None:
    """What is not in `path` as in the snapshot with this manifest. A copy that followed links has folders for them."""
    if not path.is_dir():
        return "it is no folder"
    try:
        FoundSnapshot(path, read_manifest(path, digest)).check_files()
    except SnapshotError as error:
        return str(error)
    return None


def _faults_of_kept(directory: Path, history: History, name: str) -> list[Fault]:
    faults = snapshot_faults(directory, history, name)
    # A live run may have removed what its ledger named a moment ago.
    return faults if faults and name in read_history(directory).kept() else []


def snapshot_faults(directory: Path, history: History, name: str) -> list[Fault]:
    """Everything that is wrong with the snapshot of this name."""
    try:
        folder, manifest = find_snapshot(directory, history, name)
    except SnapshotError as error:
        return [Fault("damage", str(error))]
    faults = []
    for file, record in manifest.files.items():
        try:
            check_file(folder / file, record.digest)
        except SnapshotError as error:
            faults.append(Fault("damage", str(error)))
    there = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    present = {path.relative_to(folder).as_posix(): path for path in there}
    known = {*manifest.files, MANIFEST}
    extra = sorted(file for file, path in present.items() if file not in known and not is_of_system(path))
    return [*faults, *(Fault("damage", f"{folder / file} was put there by somebody else") for file in extra)]


def _leftovers(folder: Path, history: History) -> list[Fault]:
    # Without the folder of the snapshots, each of them is missing.
    present = (folder / SNAPSHOTS).iterdir() if (folder / SNAPSHOTS).exists() else ()
    unnamed = {path.name for path in present if not is_of_system(path)} - history.kept()
    paths = [*(folder / SNAPSHOTS / name for name in sorted(unnamed)), *sorted(folder.glob(f"{TEMPORARY}*"))]
    return [Fault("unfinished", f"{path} is left over; nothing needs it") for path in paths]

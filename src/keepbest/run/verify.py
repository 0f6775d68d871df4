"""Is everything in a run folder as the ledger says, and what a crash left of it. **Rank-local**."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from keepbest.errors import SnapshotError
from keepbest.remote.download import TRIES, local_copy, read_remote_ledger, told_as_unreadable
from keepbest.remote.storage import Remote, check_remote, is_remote
from keepbest.remote.upload import snapshot_in
from keepbest.run.digest import check_file
from keepbest.run.history import History
from keepbest.run.layout import CHECKPOINTS, LEDGER, MANIFEST, REFS, SNAPSHOTS, TEMPORARY
from keepbest.run.ledger import read_ledger
from keepbest.run.reader import read_history, read_snapshot_manifest
from keepbest.run.record import Store


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is not as the ledger says.

    Attributes:
        kind: "damage" is lost for good; "unfinished" is what a crash left, and the next resume, or `repair`, mends.
        message: what was found, and where.
    """

    kind: Literal["damage", "unfinished"]
    message: str


def verify(run: Path | str) -> list[Fault]:
    """Everything that is wrong with a run; reads every byte that a ref, a pin or a best needs.

    Args:
        run: its directory, or the URL of its remote copy, of which one snapshot at a time is brought here.

    Raises:
        SnapshotError: if there is no run.
        LedgerError: if the ledger is damaged or of another format: then nothing can be said.
    """
    if is_remote(run):
        return _remote_faults(str(run))
    directory = Path(run)
    history = read_history(directory)
    return [
        *_ledger_faults(directory / CHECKPOINTS / LEDGER),
        *_ref_faults(directory / CHECKPOINTS, history),
        *(fault for name in sorted(history.kept()) for fault in _snapshot_faults(directory, history, name)),
        *_leftovers(directory / CHECKPOINTS, history),
    ]


def repair(directory: Path) -> None:
    """Finish or undo what a crash left in the run in `directory`, as a resume would. **Rank-local**.

    A torn last line is cut, refs are set as the ledger says, and what nothing needs is removed. Weights that a ref, a
    pin or a best needs are never removed, and damage is not mended.

    Raises:
        SnapshotError: if there is no run.
        LedgerError: if the ledger is damaged, lost, or older than the folder.
        RunExistsError: if a live process owns the folder.
        OSError: whatever the file system answers.
    """
    read_history(directory)
    store = Store(directory)
    try:
        store.repair()
    finally:
        store.close()


def upload(directory: Path, url: str) -> None:
    """Bring what the run in `directory` keeps to its remote copy at `url`, as a resume would. **Rank-local**.

    Raises:
        ConfigError: if the URL cannot be opened here.
        SnapshotError: if there is no run, or the copy cannot be read.
        LedgerError: if the ledger is damaged or lost, or the copy has gone another way.
        RunExistsError: if a live process owns the folder, or the copy is ahead of it.
        OSError: whatever the storage answers.
    """
    check_remote(url)
    read_history(directory)
    store = Store(directory, remote=url)
    try:
        store.upload()
    finally:
        store.close()


def _remote_faults(url: str) -> list[Fault]:
    remote = Remote(url)
    faults: list[Fault] = []
    for _ in range(TRIES):
        before = read_remote_ledger(remote)
        faults = _faults_of_remote(remote)
        # A run that goes on may have removed what its ledger named a moment ago.
        if not faults or read_remote_ledger(remote) == before:
            break
    return faults


def _faults_of_remote(remote: Remote) -> list[Fault]:
    with local_copy(remote.url) as directory:
        history = read_history(directory)
    faults = []
    for name in sorted(history.kept()):
        with local_copy(remote.url, lambda _, name=name: {name}) as directory:  # type: ignore[misc]
            found = _snapshot_faults(directory, history, name)
            faults += [Fault(fault.kind, fault.message.replace(str(directory), remote.url)) for fault in found]
    kept = tuple(f"{SNAPSHOTS}/{name}/" for name in history.kept())
    with told_as_unreadable(remote):
        paths = sorted(remote.sizes())
    left = [path for path in paths if snapshot_in(path) is not None and not path.startswith(kept)]
    leftovers = (f"{remote.url}/{CHECKPOINTS}/{path} is left over; nothing needs it" for path in left)
    return [*faults, *(Fault("unfinished", message) for message in leftovers)]


def _ledger_faults(path: Path) -> list[Fault]:
    _, whole = read_ledger(path)
    torn = path.stat().st_size - whole
    return [Fault("unfinished", f"{path}: the last line was torn off; {torn} bytes of it are left")] if torn else []


def _ref_faults(folder: Path, history: History) -> list[Fault]:
    faults = []
    for name, snapshot in sorted(history.refs.items()):
        path = folder / name
        if path.is_symlink() and path.readlink() != Path(f"{SNAPSHOTS}/{snapshot}"):
            faults.append(
                Fault("unfinished", f"{path} points at {path.readlink()}, the ledger says {SNAPSHOTS}/{snapshot}")
            )
        elif not path.exists() and not path.is_symlink():
            faults.append(Fault("unfinished", f"{path} is missing, the ledger says {SNAPSHOTS}/{snapshot}"))
    unknown = sorted({path.name for path in folder.glob(REFS)} - history.refs.keys())
    return [
        *faults,
        *(Fault("unfinished", f"{folder / name} is a ref that the ledger does not know") for name in unknown),
    ]


def _snapshot_faults(directory: Path, history: History, name: str) -> list[Fault]:
    try:
        folder, manifest = read_snapshot_manifest(directory, history, name)
    except SnapshotError as error:
        return [Fault("damage", str(error))]
    faults = []
    for file, expected in manifest["files"].items():
        try:
            check_file(folder / file, expected)
        except SnapshotError as error:
            faults.append(Fault("damage", str(error)))
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    extra = sorted(present - {*manifest["files"], MANIFEST})
    return [*faults, *(Fault("damage", f"{folder / file} was put there by somebody else") for file in extra)]


def _leftovers(folder: Path, history: History) -> list[Fault]:
    unnamed = {path.name for path in (folder / SNAPSHOTS).iterdir()} - history.kept()
    paths = [*(folder / SNAPSHOTS / name for name in sorted(unnamed)), *sorted(folder.glob(f"{TEMPORARY}*"))]
    return [Fault("unfinished", f"{path} is left over; nothing needs it") for path in paths]

"""Brings a run from a remote storage to those that read it, or go on with it. **Rank-local**."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from keepbest.errors import KeepBestError, LedgerError, SnapshotError
from keepbest.store.digest import check_file
from keepbest.store.files import Files
from keepbest.store.history import History
from keepbest.store.layout import CHECKPOINTS, LEDGER, MANIFEST, SNAPSHOTS, TEMPORARY
from keepbest.store.ledger import read_ledger
from keepbest.store.read import read_history, read_snapshot_manifest
from keepbest.store.remote import Remote, is_remote


def no_snapshot(_: History) -> Collection[str]:
    """For `local_copy`: the ledger alone."""
    return ()


def snapshot_of(ref: str) -> Callable[[History], Collection[str]]:
    """For `local_copy`: what `ref` names, if there is such a ref."""
    return lambda history: {history.refs[ref]} if ref in history.refs else ()


@contextmanager
def local_copy(
    run: str | Path, wanted: Callable[[History], Collection[str]] = no_snapshot, *, only_manifests: bool = False
) -> Iterator[Path]:
    """The directory of a run, to read in this block: `run` itself, or a temporary copy of what is at this URL.

    Args:
        run: a directory, or a URL of fsspec.
        wanted: the snapshots that are copied, of those that the ledger tells; their files are not verified yet.
        only_manifests: copy of each snapshot only what tells about it.

    Raises:
        ConfigError: if the URL cannot be opened here.
        SnapshotError: if there is no run, or it cannot be read.
        LedgerError: if its ledger is damaged or of another format.
    """
    if not is_remote(run):
        yield Path(run)
        return
    remote = Remote(str(run))
    with tempfile.TemporaryDirectory(prefix="keepbest-") as space:
        directory = Path(space)
        with _told_as_unreadable(remote):
            ledger = remote.read_ledger()
            if not ledger:
                raise SnapshotError(f"{run} has no ledger: it is not the URL of a run with checkpoints")
            folder = directory / CHECKPOINTS
            (folder / SNAPSHOTS).mkdir(parents=True)
            (folder / LEDGER).write_bytes(ledger)
            names = wanted(read_history(directory))
            sizes = remote.sizes() if names else {}
            for name in names:
                _fetch(remote, sizes, name, folder / SNAPSHOTS / name, only_manifest=only_manifests)
        yield directory


def bring_up_to(
    remote: Remote, folder: Path, files: Files, ledger_bytes: int, check: Callable[[str, History], None]
) -> tuple[int, bool]:
    """Bring the run in `folder` up to its remote copy, where that is ahead.

    The ledger comes last, when every snapshot that it keeps is there and verified.

    Args:
        remote: the copy.
        folder: `<run>/checkpoints`.
        files: by which the folder is changed.
        ledger_bytes: of the whole lines of the ledger in the folder.
        check: is asked, before anything is changed, whether the run may be brought here; raises if not.

    Returns:
        The bytes of the remote ledger, and whether the folder was brought up to it.

    Raises:
        SnapshotError: if the copy cannot be read, or is damaged.
        LedgerError: if the two have gone different ways.
        OSError: whatever the file system answers.
    """
    path, temporary = folder / LEDGER, folder / f"{TEMPORARY}{LEDGER}"
    with _told_as_unreadable(remote):
        there = remote.read_ledger()
    here = path.read_bytes()[:ledger_bytes] if path.exists() else b""
    if here.startswith(there):
        return len(there), False
    files.remove(temporary)
    try:
        with files.create(temporary) as file:
            file.write(there)
            file.sync()
        history = History.of(read_ledger(temporary)[0])
        has_begun = not History.of(read_ledger(path)[0]).is_empty
        if history.is_empty and not has_begun:
            return len(there), False
        if has_begun and not there.startswith(here):
            raise LedgerError(
                f"{remote.url} and {folder} hold runs, or ends of one run, that have gone different ways: "
                "choose an empty directory to go on with what is there, or another remote"
            )
        check(remote.url, history)
        for name in sorted(history.kept()):
            _fetch_verified(remote, folder, files, history, name)
        files.rename(temporary, path)
        files.sync_folder(folder)
    finally:
        files.remove(temporary)
    return len(there), True


def _fetch_verified(remote: Remote, folder: Path, files: Files, history: History, name: str) -> None:
    try:
        _verify(folder, history, name)
    except SnapshotError:
        temporary = folder / SNAPSHOTS / f"{TEMPORARY}{name}"
        files.remove(temporary)
        with _told_as_unreadable(remote):
            _fetch(remote, remote.sizes(), name, temporary)
        for path in (*temporary.rglob("*"), temporary):
            if path.is_dir():
                files.sync_folder(path)
            else:
                with files.append(path) as file:
                    file.sync()
        files.remove(folder / SNAPSHOTS / name)
        files.rename(temporary, folder / SNAPSHOTS / name)
        files.sync_folder(folder / SNAPSHOTS)
        _verify(folder, history, name)


def _verify(folder: Path, history: History, name: str) -> None:
    snapshot, manifest = read_snapshot_manifest(folder.parent, history, name)
    for file, entry in manifest["files"].items():
        check_file(snapshot / file, entry)


def _fetch(remote: Remote, sizes: Mapping[str, int], name: str, to: Path, *, only_manifest: bool = False) -> None:
    prefix = f"{SNAPSHOTS}/{name}/"
    for path in sizes:
        if path.startswith(prefix) and (not only_manifest or path == f"{prefix}{MANIFEST}"):
            file = to / path.removeprefix(prefix)
            file.parent.mkdir(parents=True, exist_ok=True)
            remote.get(path, file)


@contextmanager
def _told_as_unreadable(remote: Remote) -> Iterator[None]:
    try:
        yield
    except KeepBestError:
        raise
    except Exception as error:
        raise SnapshotError(f"{remote.url} cannot be read: {error!r}") from error

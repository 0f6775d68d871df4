"""Brings a run from a remote storage to those that read or resume it. **Rank-local**."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from keepbest.errors import KeepBestError, LedgerError, SnapshotError
from keepbest.remote.storage import Remote, is_remote, local_path, snapshot_in
from keepbest.run.files import Files
from keepbest.run.history import History
from keepbest.run.layout import CHECKPOINTS, LEDGER, MANIFEST, SNAPSHOTS, TEMPORARY
from keepbest.run.ledger import read_ledger
from keepbest.run.manifest import Manifest
from keepbest.run.reader import FoundSnapshot, bests_of, read_history, read_manifest
from keepbest.user_code import Log

_logger = Log(__name__)

TRIES = 5
_LOCAL_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def no_snapshot(_: History) -> Collection[str]:
    """For `local_copy`: the ledger alone."""
    return ()


def snapshot_of(ref: str | None) -> Callable[[History], Collection[str]]:
    """For `local_copy`: what `ref` names, if there is such a ref; for `None`, the only best."""

    def wanted(history: History) -> Collection[str]:
        names = [ref] if ref is not None else bests_of(history)
        return {history.refs[name] for name in names if name in history.refs} if len(names) == 1 else ()

    return wanted


def every_file(manifest: Manifest) -> Collection[str]:
    """For `local_copy`: all that the manifest names."""
    return manifest.files.keys()


def no_file(_: Manifest) -> Collection[str]:
    """For `local_copy`: the manifest alone."""
    return ()


@contextmanager
def local_copy(
    run: str | Path,
    wanted: Callable[[History], Collection[str]] = no_snapshot,
    *,
    files: Callable[[Manifest], Collection[str]] = every_file,
    damaged: dict[Path, str] | None = None,
) -> Iterator[Path]:
    """The directory of a run, to read in this block: `run` itself, or a temporary copy of what is at this URL.

    Args:
        run: Directory, or URL of fsspec.
        wanted: Snapshots that are copied, of those that the ledger knows. Their files are not verified yet, and one
            that is not there is left out.
        files: Function that says which files of a snapshot are copied, beside its manifest.
        damaged: What receives the paths in the copy of files that are too large to be brought, and why; `None` makes
            that an error.

    Raises:
        ConfigError: If the URL cannot be opened here.
        SnapshotError: If there is no run, or it cannot be read.
        LedgerError: If its ledger is damaged or of another version.
        OSError: If there is no room for the copy.
    """
    if not is_remote(run):
        yield local_path(run, "run")
        return
    remote = Remote(str(run))
    with _temporary_folder() as directory:
        (directory / CHECKPOINTS / SNAPSHOTS).mkdir(parents=True)
        with _naming(directory, str(run)):
            for _ in range(TRIES):
                ledger = _fetch_ledger(remote, directory)
                history = read_history(directory)
                too_large: dict[Path, str] = {}
                names = wanted(history)
                complete = [_fetch_if_there(remote, directory, history, name, files, too_large) for name in names]
                # A live run may have removed what its ledger named a moment ago.
                if all(complete) or read_remote_ledger(remote) == ledger:
                    break
            if damaged is not None:
                damaged |= too_large
            elif too_large:
                raise SnapshotError("; ".join(too_large.values()))
            yield directory


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder for this block. A network may hold on to files that are still open, as those of a tensor are."""
    folder = tempfile.TemporaryDirectory(prefix="keepbest-")
    try:
        yield Path(folder.name)
    finally:
        try:
            folder.cleanup()
        except OSError as error:  # one rank alone would raise it, and what was read is complete
            _logger.warning("the temporary copy %s cannot be removed: %s", folder.name, error)


@contextmanager
def _naming(here: Path, there: str) -> Iterator[None]:
    """Let errors name what is at `there`, of which `here` was a temporary copy."""
    try:
        yield
    except (SnapshotError, LedgerError) as error:
        if str(here) not in str(error):
            raise
        raise type(error)(str(error).replace(str(here), there)) from error


def read_remote_ledger(remote: Remote) -> bytes:
    """The ledger; empty if there is none. Raises `SnapshotError` if it cannot be read."""
    with raising_unreadable(remote):
        return remote.read_ledger()


def bring_up_to(
    remote: Remote, folder: Path, files: Files, ledger_bytes: int, check: Callable[[str | Path, History], None]
) -> bool:
    """Bring the run in `folder` up to its remote copy, where that is ahead, or has what is missing here.

    The ledger comes last, when every snapshot that it keeps is there and verified.

    Args:
        remote: Copy of the run.
        folder: `<run>/checkpoints`.
        files: Operations that change the folder.
        ledger_bytes: Bytes of the whole lines of the ledger in the folder.
        check: Function that raises, before anything is changed, if the run may not be brought here.

    Returns:
        Whether the folder has another ledger now.

    Raises:
        SnapshotError: If the copy cannot be read, or is damaged.
        LedgerError: If the two have gone different ways, or the copy has lost its ledger.
        OSError: Any refusal of the file system.
    """
    path, temporary = folder / LEDGER, folder / f"{TEMPORARY}{LEDGER}"
    there = read_remote_ledger(remote)
    here = path.read_bytes()[:ledger_bytes] if path.exists() else b""
    ours = History.of(read_ledger(path)[0], path)
    if not there:
        _refuse_unknown_snapshots(remote, ours)
        return False
    if here.startswith(there):
        for name in sorted(ours.copied()):
            if not (folder / SNAPSHOTS / name).exists():
                with suppress(FileNotFoundError):  # it was missing here before, too
                    _fetch_verified(remote, folder, files, ours, name)
        return False
    if not ours.is_empty and not there.startswith(here):
        raise LedgerError(
            f"{remote.url} and {folder} hold runs, or ends of one run, that have gone different ways: choose an empty "
            "directory to continue with what is there, or another remote"
        )
    files.remove(temporary)
    try:
        with files.create(temporary) as file:
            file.write(there)
            file.sync()
        with _naming(temporary, f"{remote.url}/{CHECKPOINTS}/{LEDGER}"):
            history = History.of(read_ledger(temporary)[0], temporary)
        check(remote.url, history)
        for name in sorted(history.copied()):
            if not _is_whole(folder / SNAPSHOTS / name, history.manifests[name]):
                try:
                    _fetch_verified(remote, folder, files, history, name)
                except FileNotFoundError as error:
                    raise SnapshotError(f"{remote.url} has lost snapshot {name}: {error}") from error
        files.rename(temporary, path)
        files.sync_folder(folder)
    finally:
        files.remove(temporary)
    return True


@contextmanager
def raising_unreadable(remote: Remote) -> Iterator[None]:
    """Turn errors of the storage's client into a `SnapshotError`, except for what is missing there, or full here."""
    try:
        yield
    except (KeepBestError, FileNotFoundError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _LOCAL_REFUSALS:
            raise
        raise SnapshotError(f"{remote.url} cannot be read: {error!r}") from error


def _fetch_ledger(remote: Remote, directory: Path) -> bytes:
    if not (ledger := read_remote_ledger(remote)):
        raise SnapshotError(f"{remote.url} has no ledger: it is not the URL of a run with checkpoints")
    (directory / CHECKPOINTS / LEDGER).write_bytes(ledger)
    return ledger


def _fetch_if_there(
    remote: Remote,
    directory: Path,
    history: History,
    name: str,
    files: Callable[[Manifest], Collection[str]],
    damaged: dict[Path, str],
) -> bool:
    to = directory / CHECKPOINTS / SNAPSHOTS / name
    try:
        _fetch_manifest(remote, name, to)
        try:
            manifest = read_manifest(to, history.manifests[name])
        except SnapshotError:  # as whoever reads it will find
            return False
        found = _fetch_files(remote, name, to, manifest, files(manifest))
    except FileNotFoundError:
        return False
    damaged.update(found)
    return not found


def _fetch_manifest(remote: Remote, name: str, to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    with raising_unreadable(remote):
        remote.get(f"{SNAPSHOTS}/{name}/{MANIFEST}", to / MANIFEST)


def _fetch_files(remote: Remote, name: str, to: Path, manifest: Manifest, files: Collection[str]) -> dict[Path, str]:
    """Bring files of a snapshot to the folder `to`. Returns those that are too large for that, and why."""
    damaged = {}
    with raising_unreadable(remote):
        for file in files:
            size, expected = remote.size(path := f"{SNAPSHOTS}/{name}/{file}"), manifest.files[file].digest.bytes
            if size > expected:  # it would be refused after it had filled the disk
                place = f"{remote.url}/{CHECKPOINTS}/{path}"
                damaged[to / file] = f"{place} is damaged: it has {size} bytes, {expected} were written"
                continue
            (to / file).parent.mkdir(exist_ok=True)
            remote.get(path, to / file)
    return damaged


def _fetch_verified(remote: Remote, folder: Path, files: Files, history: History, name: str) -> None:
    temporary, digest = folder / SNAPSHOTS / f"{TEMPORARY}{name}", history.manifests[name]
    files.remove(temporary)
    with _naming(temporary, f"{remote.url}/{CHECKPOINTS}/{SNAPSHOTS}/{name}"):
        _fetch_manifest(remote, name, temporary)
        manifest = read_manifest(temporary, digest)
        if damaged := _fetch_files(remote, name, temporary, manifest, manifest.files):
            raise SnapshotError("; ".join(damaged.values()))
        FoundSnapshot(temporary, manifest).check_files()
    for path in (*temporary.rglob("*"), temporary):
        if path.is_dir():
            files.sync_folder(path)
        else:
            files.sync_file(path)
    files.remove(folder / SNAPSHOTS / name)
    files.rename(temporary, folder / SNAPSHOTS / name)
    files.sync_folder(folder / SNAPSHOTS)


def _is_whole(folder: Path, digest: str) -> bool:
    try:
        FoundSnapshot(folder, read_manifest(folder, digest)).check_files()
    except SnapshotError:
        return False
    return True


def _refuse_unknown_snapshots(remote: Remote, history: History) -> None:
    with raising_unreadable(remote):
        names = {name for path in remote.sizes() if (name := snapshot_in(path)) is not None}
    if unknown := names - history.manifests.keys():
        raise LedgerError(
            f"{remote.url} has no ledger, and snapshots that are none of this run: {', '.join(sorted(unknown))}; "
            "choose another remote, or remove them"
        )

"""Compares the remote copy of a run with its ledger. **Rank-local**."""

from __future__ import annotations

from pathlib import Path

from keepbest.remote.download import TRIES, local_copy, raising_unreadable, read_remote_ledger
from keepbest.remote.live import named_now
from keepbest.remote.storage import Remote, is_remote, local_path, snapshot_in
from keepbest.run.history import History
from keepbest.run.layout import CHECKPOINTS, LEDGER, SNAPSHOTS
from keepbest.run.reader import read_history
from keepbest.run.verify import Fault, snapshot_faults, verify


def verify_run(run: Path | str) -> list[Fault]:
    """Everything that is wrong with a run, wherever it is.

    Args:
        run: Directory of the run, or the URL of its remote copy, of which one snapshot at a time is brought here.

    Raises:
        ConfigError: If the URL cannot be opened here.
        SnapshotError: If there is no run, or it cannot be read.
        LedgerError: If the ledger is damaged or of another version: then nothing else can be checked.
    """
    return _remote_faults(str(run)) if is_remote(run) else _faults_of_directory(local_path(run, "run"))


def _faults_of_directory(directory: Path) -> list[Fault]:
    faults: list[Fault] = []
    for _ in range(TRIES):
        before = named_now(directory, History.kept)
        faults = verify(directory)
        # A live run may have removed what its ledger named a moment ago.
        if not faults or named_now(directory, History.kept) == before:
            break
    return faults


def _remote_faults(url: str) -> list[Fault]:
    remote = Remote(url)
    faults: list[Fault] = []
    for _ in range(TRIES):
        before = read_remote_ledger(remote)
        faults = _faults_of_remote(remote)
        # A live run may have removed what its ledger named a moment ago.
        if not faults or read_remote_ledger(remote) == before:
            break
    return faults


def _faults_of_remote(remote: Remote) -> list[Fault]:
    with local_copy(remote.url) as directory:
        history = read_history(directory)
    faults = _ledger_faults(remote)
    for name in sorted(history.copied()):
        damaged: dict[Path, str] = {}
        with local_copy(remote.url, lambda _, name=name: {name}, damaged=damaged) as directory:  # type: ignore[misc]
            found = snapshot_faults(directory, history, name)
            if name not in read_history(directory).copied():
                continue  # a live run has removed it meanwhile
            # What is too large was not brought here, so it is missing.
            others = [fault for fault in found if not any(str(path) in fault.message for path in damaged)]
            faults += [Fault("damage", message) for message in damaged.values()]
            faults += [Fault(fault.kind, fault.message.replace(str(directory), remote.url)) for fault in others]
    # Until training ends, what the ledger does not name may be on its way, or about to be removed.
    return [*faults, *_leftovers(remote, history)] if history.has_ended else faults


def _ledger_faults(remote: Remote) -> list[Fault]:
    with raising_unreadable(remote):
        torn = len(remote.read(LEDGER) or b"") - len(remote.read_ledger())
    message = f"{remote.url}/{CHECKPOINTS}/{LEDGER}: the last line was torn off; {torn} bytes of it are left"
    return [Fault("unfinished", message)] if torn > 0 else []


def _leftovers(remote: Remote, history: History) -> list[Fault]:
    kept = tuple(f"{SNAPSHOTS}/{name}/" for name in history.copied())
    with raising_unreadable(remote):
        paths = sorted(remote.sizes())
    left = [path for path in paths if snapshot_in(path) is not None and not path.startswith(kept)]
    return [Fault("unfinished", f"{remote.url}/{CHECKPOINTS}/{path} is left over; nothing needs it") for path in left]

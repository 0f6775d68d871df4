"""Repairs a run folder that no process works on, or moves it out of the way. **Rank-local**."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from keepbest.run.files import Files
from keepbest.run.folder import RunFolder
from keepbest.run.layout import ledger_exists
from keepbest.run.lock import RunLock
from keepbest.run.reader import read_history


def repair(directory: Path) -> None:
    """Finish or undo what a crash left in the run in `directory`, as a resume would. **Rank-local**.

    A torn last line is cut, refs are set as the ledger says, and snapshots that nothing needs are removed. Weights that
    a ref, a pin or a best needs are never removed. Damage stays as it is.

    Raises:
        SnapshotError: If there is no run.
        LedgerError: If the ledger is damaged, lost, or older than the folder.
        RunExistsError: If a live process owns the folder.
        OSError: Any refusal of the file system.
    """
    read_history(directory)
    remedy = "it finishes itself what it has begun, so repair the run when it has ended"
    folder = RunFolder(directory, Files(), lock=partial(RunLock, remedy=remedy))
    try:
        folder.claim()
        folder.repair()
    finally:
        folder.close()


def set_aside(directory: Path, *beside: str) -> None:
    """Move the run in `directory`, if there is one, to a free directory beside it, for another run. **Rank-local**.

    Args:
        directory: Directory of the run.
        *beside: Names of what else belongs to the run there.

    Raises:
        LedgerError: If the ledger is damaged.
        RunExistsError: If a live process owns the folder.
        OSError: Any refusal of the file system.
    """
    if not ledger_exists(directory):
        return
    folder = RunFolder(directory, Files())
    try:
        folder.claim()
        if folder.is_resumed:
            folder.set_aside(*beside)
    finally:
        folder.close()

"""Brings a run that no process works on to its remote copy. **Rank-local**."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from keepbest.errors import RunExistsError
from keepbest.remote.copy import FollowingCopy
from keepbest.remote.storage import check_remote
from keepbest.run.files import Files
from keepbest.run.folder import RunFolder
from keepbest.run.history import History
from keepbest.run.lock import RunLock
from keepbest.run.reader import read_history


def upload(directory: Path, url: str, *, patience: float = 300.0) -> None:
    """Bring what the run in `directory` keeps to its remote copy at `url`, as a resume would. **Rank-local**.

    Args:
        directory: Directory of the run.
        url: URL of the copy.
        patience: Seconds for which it is tried again without getting ahead.

    Raises:
        ConfigError: If the URL cannot be opened here.
        SnapshotError: If there is no run, or the copy cannot be read.
        LedgerError: If the ledger is damaged or lost, or the copy has gone another way.
        RunExistsError: If a live process owns the folder, or the copy is ahead of it.
        OSError: Any refusal of the storage.
    """
    check_remote(url)
    read_history(directory)
    copy = FollowingCopy(url, time.monotonic, patience)
    remedy = f"upload the run when it has ended, or let it follow by itself: remote={url!r} in its settings"
    folder = RunFolder(directory, Files(), copy, lock=partial(RunLock, remedy=remedy))

    def refuse(place: str | Path, _: History) -> None:
        raise RunExistsError(f"{place} is ahead of {directory}; a resume of the run would bring that up to it")

    try:
        folder.claim()
        folder.bring_up_to_copy(refuse)
        folder.check_is_whole()
        folder.follow_now()
        copy.arrive()
    finally:
        folder.close()

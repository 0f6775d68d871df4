"""Reads a run that may be in training, which may remove at any moment what its ledger has named. **Rank-local**."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

from keepbest.errors import SnapshotError
from keepbest.remote.download import TRIES, local_copy
from keepbest.run.history import History
from keepbest.run.manifest import Manifest
from keepbest.run.reader import read_history

T = TypeVar("T")
Wanted = Callable[[History], Collection[str]]


def named_now(run: str | Path, wanted: Wanted) -> set[str]:
    """The snapshots that are wanted, by the ledger as it is now. Raises as `local_copy`."""
    with local_copy(run) as directory:
        return {*wanted(read_history(directory))}


def read_snapshots(
    run: str | Path,
    wanted: Wanted,
    read: Callable[[Path, History], T],
    *,
    files: Callable[[Manifest], Collection[str]],
) -> T:
    """What `read` returns. It is called again where it fails and the run has other snapshots to read by then.

    Args:
        run: Directory of the run, or the URL of its remote copy.
        wanted: Function that says which snapshots are read.
        read: Function of the directory to read and of its history. It leaves nothing behind where it fails.
        files: Function that says which files of a snapshot are read, beside its manifest.

    Raises:
        SnapshotError, OSError: What `read` raises, if the ledger still names the same snapshots, or others each time.
    """
    for attempt in range(TRIES):
        with local_copy(run, wanted, files=files) as directory:
            history = read_history(directory)
            try:
                return read(directory, history)
            except (SnapshotError, FileNotFoundError):
                if attempt == TRIES - 1 or named_now(run, wanted) == {*wanted(history)}:
                    raise
    raise RuntimeError("each attempt returns, raises, or is followed by another one")

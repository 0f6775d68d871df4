"""What a run keeps a snapshot for, read from its ledger where only the path of its folder is known. **Rank-local**."""

from __future__ import annotations

from pathlib import Path

from keepbest.run.reader import read_history


def is_best_of_its_run(path: Path) -> bool:
    """Whether the snapshot in the folder `path` is the best that a keeper of its run has ever saved.

    Raises:
        SnapshotError: If it is in no run.
        LedgerError: If the ledger is damaged or of another version.
    """
    history = read_history(path.parents[2])
    return any(history.refs.get(keeper) == path.name for keeper in history.keepers)

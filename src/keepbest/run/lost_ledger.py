"""Shows that a ledger was lost, or replaced by an older one, from what its folder holds. **Rank-local**."""

from __future__ import annotations

from pathlib import Path

from keepbest.run.history import History
from keepbest.run.layout import LEDGER
from keepbest.run.ref_links import RefLinks
from keepbest.run.snapshot_folder import SnapshotFolder


def unknown_snapshots(snapshots: SnapshotFolder, links: RefLinks, history: History, ledger_bytes: int) -> set[str]:
    """The snapshots that a ledger of so many bytes should know and does not. What a crash has left is none of these.

    The ledger knows every snapshot before anything points at it, so what it does not know is not garbage here: it is
    what a ledger that was lost, or replaced by an older one, knew.
    """
    names = snapshots.names()
    unknown = names - history.manifests.keys()
    # A crash leaves a snapshot that was not committed yet, and everything that the ledger keeps.
    if history.run_id is None or not history.copied() <= names:
        return unknown
    later = {name for name in unknown if snapshots.ledger_bytes(name) > ledger_bytes}
    return unknown & links.targets() | later


def describe_unknown(folder: Path, unknown: set[str]) -> str:
    """Say what is wrong with the ledger of the run in `folder`, and what to do."""
    names = ", ".join(sorted(unknown))
    return (
        f"{folder / LEDGER} does not know the snapshots {names}: it was lost, or is an older copy. Restore it. A "
        "new run needs another directory"
    )

"""What happens in a run folder right now, seen from outside. **Rank-local**; no lock is taken."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from keepbest.run.layout import CHECKPOINTS, LOCK, snapshots_folder
from keepbest.run.lock import read_owner
from keepbest.run.snapshot_folder import unfinished_snapshots


@dataclass(frozen=True, slots=True)
class Activity:
    """What the process that works in a run is doing.

    Attributes:
        host: Host of the process, as it says itself.
        pid: Number of the process there.
        writing: Bytes that are there of each snapshot that is being written, by its name.
        remote: URL of the copy that follows the run; `None` if there is none.
        uploading: Names of the snapshots that are being brought there.
    """

    host: str
    pid: int
    writing: dict[str, int]
    remote: str | None = None
    uploading: tuple[str, ...] = ()


def read_activity(directory: Path) -> Activity | None:
    """Return what happens in the run in `directory`; `None` where no process holds it, or none can be seen."""
    owner = read_owner(directory / CHECKPOINTS / LOCK)
    if owner is None:
        return None
    return Activity(
        owner.host, owner.pid, unfinished_snapshots(snapshots_folder(directory)), owner.remote, owner.uploading
    )

"""What the run folder records of resume checkpoints: snapshots that training continues from, and the refs on them."""

from __future__ import annotations

from pathlib import Path

from keepbest.iteration import TrainingIteration
from keepbest.run.events import CheckpointSaved, Moves, Rewound
from keepbest.run.folder import RunFolder
from keepbest.run.history import History
from keepbest.run.names import LATEST, RESUME_PREFIX, resume_ref


def checkpoint_refs(history: History) -> dict[str, TrainingIteration]:
    """The refs on resume checkpoints, oldest iteration first, without the one on the latest."""
    found = {
        ref: history.checkpoints[snapshot].iteration
        for ref, snapshot in history.refs.items()
        if ref.startswith(RESUME_PREFIX) and ref != LATEST and snapshot in history.checkpoints
    }
    return dict(sorted(found.items(), key=lambda each: each[1].update or 0))


def forget_gone(folder: RunFolder) -> None:
    """Remove the refs on resume checkpoints that somebody has removed, or that a remote copy did not have.

    Raises:
        OSError: Any refusal of the file system.
    """
    refs, holds = folder.history.refs, folder.snapshots.holds
    gone = {ref for ref, snapshot in refs.items() if ref.startswith(RESUME_PREFIX) and not holds(snapshot)}
    if gone:
        folder.commit(Rewound(tuple(sorted(folder.history.abandoned - gone)), dict.fromkeys(gone, None)))


class CheckpointRecord:
    """The record of the resume checkpoints of a run. **Rank-local**: rank 0 alone has one.

    Args:
        folder: Run folder that it is in.
        keep_last: Number of checkpoints to keep; `None` keeps all of this timeline.
    """

    keeper = None
    metric_key = None

    def __init__(self, folder: RunFolder, keep_last: int | None) -> None:
        self.folder = folder
        self._keep_last = keep_last

    def begin(self, at: TrainingIteration, resumed_from: Path | None) -> None:
        """Get ready to record, and abandon the checkpoints after the iteration at which training continues.

        They stay until the next one is saved, in case somebody wants to return to them.

        Args:
            at: Iteration at which training continues.
            resumed_from: Folder of the snapshot that it continues from; `None` where it starts anew.

        Raises:
            LedgerError: If the ledger is not the one that the folder was written with.
            OSError: Any refusal of the file system.
        """
        folder = self.folder
        folder.check_is_whole()
        folder.open(None)
        forget_gone(folder)
        history = folder.history
        is_here = resumed_from is not None and resumed_from.resolve().parent.parent == folder.path.resolve()
        snapshot = resumed_from.name if resumed_from is not None and is_here else None
        refs = checkpoint_refs(history)
        left = {ref for ref, each in refs.items() if snapshot is None or each.follows(at)}
        abandoned = (history.abandoned | left) - {ref for ref in refs if history.refs[ref] == snapshot}
        moves: Moves = {} if history.refs.get(LATEST) == snapshot else {LATEST: snapshot}
        if moves or abandoned != history.abandoned:
            folder.commit(Rewound(tuple(sorted(abandoned)), moves))

    def keep(self, iteration: TrainingIteration, snapshot: str, manifest: str) -> None:
        """Commit a checkpoint that is durable, and let go of those that it replaces.

        Args:
            iteration: Training iteration after which training continues from it.
            snapshot: Name of the snapshot that holds it.
            manifest: Digest of its manifest.

        Raises:
            OSError: Any refusal of the file system. Nothing was recorded then, unless the ledger `is_torn`.
        """
        folder = self.folder
        folder.catch_up()
        history = folder.history
        before = checkpoint_refs(history)
        past = [ref for ref, each in before.items() if iteration.follows(each) and ref not in history.abandoned]
        kept = past if self._keep_last is None else past[max(len(past) - self._keep_last + 1, 0) :]
        moves: Moves = dict.fromkeys((ref for ref in before if ref not in kept), None)
        moves |= {resume_ref(iteration): snapshot, LATEST: snapshot}
        timelines = [(keeper.policy, keeper.present) for keeper in history.keepers.values()]
        needs = {
            name
            for policy, timeline in timelines
            for name in timeline.snapshots_of(timeline.state(policy, until=timeline.last_iteration))
            if folder.snapshots.holds(name)
        }
        event = CheckpointSaved(iteration, snapshot, manifest, tuple(sorted(needs)), moves)
        folder.commit(event, withdraw=True)

"""`ResumeSaver`: writes resume checkpoints as snapshots of the run folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from keepbest.capture.inventory import Inventory
from keepbest.capture.share import Items
from keepbest.capture.ways import find_way
from keepbest.formats.registry import find_format
from keepbest.iteration import TrainingIteration
from keepbest.ranks import Ranks
from keepbest.run.checkpoints import CheckpointRecord
from keepbest.saving.job import PendingSnapshot
from keepbest.saving.open_run import RESUME_SAVER, OpenRun
from keepbest.saving.saver import DISK_REMEDY
from keepbest.saving.shared_folder import check_is_shared
from keepbest.staging.live import Unstaged


class ResumeSaver:
    """Saves everything that training continues from, a share from each rank, and waits until it is on the disk.

    It is the path of a keeper that has no metric: the same capture, snapshots, ledger, lock and garbage.

    Args:
        directory: Directory of the run.
        items: What is saved.
        ranks: Ranks that train together.
        keep_last: Number of checkpoints to keep; `None` keeps all of this timeline.
    """

    def __init__(self, directory: Path, items: Items, ranks: Ranks, *, keep_last: int | None) -> None:
        self._run = OpenRun(directory).share()
        self._ranks, self._keep_last = ranks, keep_last
        self._format = find_format("dcp")
        self._way = find_way(self._format.capture)
        self._inventory = Inventory(items, self._format, ranks)
        self._record: CheckpointRecord | None = None

    def start(self, at: TrainingIteration, resumed_from: Path | None) -> None:
        """Open the run folder, after all keepers in it have started. **Collective**.

        Args:
            at: Iteration at which training continues. The checkpoints after it are abandoned.
            resumed_from: Folder of the snapshot that it continues from; `None` where it starts anew.

        Raises:
            RunExistsError: On every rank, if the folder is in use by another process.
            LedgerError: On every rank, if the ledger is damaged or of another version.
            ConfigError: On every rank, if something cannot be kept and loaded again, or something else saves resume
                checkpoints in this folder.
            StorageError: On every rank, if the folder cannot be written, or the ranks do not see one folder.
        """
        step = f"open {self._run.directory} for resume checkpoints at {at}"
        try:
            self._inventory.take(step)
            self._ranks.agree(step, lambda: self._run.join_beside_keepers(self))
            check_is_shared(self._run.directory, self._run.files, self._ranks, step)
            self._ranks.broadcast(step, lambda: self._begin(at, resumed_from), remedy=DISK_REMEDY, saving=True)
        except BaseException:
            self.leave()
            raise

    def save(self, iteration: TrainingIteration) -> None:
        """Save a checkpoint, durably. **Collective**.

        Raises:
            ConfigError: On every rank, if something cannot be kept and loaded again.
            StorageError: On every rank, if it cannot be written. The one before it is as it was.
            KeepBestError: As the capture of the format.
        """
        step, run = f"write the resume checkpoint {iteration}", self._run
        with torch.inference_mode(mode=False), torch.no_grad():
            share = self._way.capture(self._inventory, Unstaged(), step)
        snapshot = PendingSnapshot(
            share,
            self._format,
            iteration,
            None,
            directory=run.directory,
            files=run.files,
            selection=RESUME_SAVER,
            record=self._record,
        )
        try:
            snapshot.meet(run.worker.drain)
            self._ranks.broadcast(step, lambda: self._commit(iteration, snapshot), remedy=DISK_REMEDY, saving=True)
        finally:
            if self._record is not None:
                self._record.folder.end_snapshot()

    def finish_removal(self) -> None:
        """Wait until the space of the checkpoints that were replaced is free. **Rank-local**."""
        if self._record is not None:
            self._record.folder.snapshots.finish_removal()

    def leave(self) -> None:
        """Release the run folder, unless keepers are in it. **Rank-local**."""
        self._record = None
        self._run.leave(RESUME_SAVER, self)

    def abandon(self) -> None:
        """As `leave`, when training failed. **Rank-local**."""
        self.leave()

    def _begin(self, at: TrainingIteration, resumed_from: Path | None) -> None:
        self._record = CheckpointRecord(self._run.open_folder(), self._keep_last)
        self._record.begin(at, resumed_from)

    def _commit(self, iteration: TrainingIteration, snapshot: PendingSnapshot) -> None:
        if self._record is None:
            raise RuntimeError("a resume checkpoint is saved between start and leave")
        snapshot.commit(partial(self._record.keep, iteration))

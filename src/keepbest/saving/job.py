"""A save on its way: a snapshot that is being written, and the line that commits it for one keeper."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, TypeVar

from keepbest.capture.share import Receipts, Share
from keepbest.formats.format import Format, Receipt
from keepbest.iteration import TrainingIteration
from keepbest.run.files import Files
from keepbest.run.folder import RunFolder
from keepbest.run.layout import snapshots_folder, unfinished_folder
from keepbest.run.manifest import Manifest, SavedPart
from keepbest.run.record import KeeperRecord
from keepbest.run.ref_moves import Kept
from keepbest.staging.slot import Slot

T = TypeVar("T")


class Written(NamedTuple):
    """A snapshot that is durable: its name, and the digest of its manifest."""

    name: str
    manifest: str


class Record(Protocol):
    """What commits a snapshot: the record of a keeper, or that of the resume checkpoints, which have no metric."""

    @property
    def folder(self) -> RunFolder: ...
    @property
    def keeper(self) -> str | None: ...
    @property
    def metric_key(self) -> str | None: ...


class PendingSnapshot:
    """A snapshot that was captured and is on its way to the disk. Keepers that save the same weights share one.

    Every rank has one, since all must know when it can be shared. Rank 0 completes it.

    Args:
        share: What this rank writes.
        format: Format of the files.
        iteration: Training iteration whose weights these are.
        value: Value that was observed; `None` for a resume checkpoint.
        directory: Directory of the run.
        files: Operations that change the folder.
        selection: What is saved; distinguishes snapshots of one iteration.
        record: On rank 0, the record of the keeper or saver that took it; `None` elsewhere.
    """

    def __init__(
        self,
        share: Share,
        format: Format,  # noqa: A002  # the word of the setting
        iteration: TrainingIteration,
        value: float | None,
        *,
        directory: Path,
        files: Files,
        selection: str,
        record: Record | None,
    ) -> None:
        self._share: Share | None = share  # `None` once it is written, so that the weights are freed
        self._format = format
        self._iteration, self._value = iteration, value
        self._directory = directory
        self._selection = selection
        self._record = record
        self._files = files
        self._name = ""
        self._receipts: Receipts | None = None
        self._written: Written | None = None
        self._is_needed = False
        # Which of the two comes first is decided in one step of C, and not under a lock: a handler of a signal may
        # flush, and so wait for the other thread, at any line.
        self._fate: dict[Literal["fate"], Literal["begun", "given up"]] = {}

    def meet(self, drain: Callable[[], None]) -> None:
        """Let the ranks that write come together. **Collective** where several ranks write now.

        Args:
            drain: Function that waits on rank 0 for what is being written, whose commits remove unfinished folders.

        Raises:
            KeepBestError: On every rank, if a rank could not write its share.
        """
        share = self._unwritten()
        try:
            self._receipts = share.writers(partial(self._begin, drain), self._write)
        except BaseException:
            self._drop()
            raise
        if self._receipts is None:
            self._share = None  # this rank has written what it had

    def contribute(self) -> None:
        """Write what this rank still has to write. **Rank-local**, on the other ranks than 0, on any thread.

        Raises:
            ConnectionError: If rank 0 cannot learn of it. All other failures are reported to rank 0, which raises them.
        """
        receipts, self._receipts = self._receipts, None
        if receipts is None:
            return
        try:
            receipts()
        finally:
            self._unwritten().slot.release()
            self._share = None

    def need(self) -> None:
        """Have it written even if a better one follows, since something else names it. **Rank-local**."""
        self._is_needed = True

    def give_up(self) -> Slot | None:
        """Take back the slot if nobody has begun to write, or needs the snapshot. **Rank-local**, on rank 0."""
        if self._is_needed or self._fate.setdefault("fate", "given up") == "begun":
            return None
        slot, self._share, self._receipts = self._unwritten().slot, None, None
        return slot

    def begin(self) -> bool:
        """Whether it is to be written; from now on it cannot be given up. **Rank-local**, on rank 0."""
        return self._fate.setdefault("fate", "begun") == "begun"

    def write(self) -> Written:
        """Write and publish it, once. **Rank-local**, on rank 0.

        Raises:
            OSError: Any refusal of the file system, now or when the keeper that took it wrote or committed it.
        """
        # A commit in between, as of the loss of the keeper that took it, may have removed what no line names.
        if self._written is not None and _of_rank_0(self._record).folder.snapshots.holds(self._written.name):
            return self._written
        receipts, self._receipts = self._receipts, None
        if receipts is None:
            raise OSError(f"the snapshot of {self._iteration}, which another keeper took, could not be kept")
        try:
            self._written = self._complete(receipts)
        except BaseException:
            self._drop()
            raise
        finally:
            self._unwritten().slot.release()
            self._share = None
        return self._written

    def commit(self, keep: Callable[[str, str], T]) -> T:
        """Write it, and commit it by `keep`. **Rank-local**, on rank 0.

        Where the disk refuses the commit, it is removed, unless something else needs it.

        Args:
            keep: Function that commits it, of its name and the digest of its manifest.

        Raises:
            OSError: As `write` and `keep`.
        """
        written = self.write()
        try:
            return keep(written.name, written.manifest)
        except OSError:
            # A line that could not be taken back may be read as committed, and then needs its snapshot.
            if not _of_rank_0(self._record).folder.is_torn:
                self._drop_unless_needed()
            raise

    @property
    def name(self) -> str:
        """Its name; empty on other ranks than 0, and before it is begun."""
        return self._name

    def _drop_unless_needed(self) -> None:
        if not self._is_needed:
            self._written = None  # a keeper that needs it from now on has to do without it
            self._drop()

    def _begin(self, drain: Callable[[], None]) -> str:
        drain()
        record = _of_rank_0(self._record)
        self._name = record.folder.new_name(self._iteration, self._selection)
        record.folder.begin_snapshot(self._name)
        return self._name

    def _write(self, name: str) -> Receipt:
        share = self._unwritten()
        share.slot.wait()
        folder = unfinished_folder(snapshots_folder(self._directory), name)
        return self._format.write(self._files, folder, share)

    def _complete(self, receipts: Receipts) -> Written:
        record, share = _of_rank_0(self._record), self._unwritten()
        written = receipts()
        folder = unfinished_folder(snapshots_folder(self._directory), self._name)
        manifest = Manifest(
            run=record.folder.run_id,
            iteration=self._iteration,
            keeper=record.keeper,
            metric_key=record.metric_key,
            value=self._value,
            format=self._format.name,
            parts=tuple(SavedPart(part.name, part.path, part.apart) for part in share.parts),
            training_state=share.training_state,
            files=self._format.complete(self._files, folder, share, written),
            left_out=share.left_out,
            versions=share.versions,
            ledger_bytes=record.folder.durable_bytes,
        )
        return Written(self._name, record.folder.snapshots.publish(self._name, manifest))

    def _unwritten(self) -> Share:
        if self._share is None:
            raise RuntimeError(f"the snapshot of {self._iteration} was written or given up")
        return self._share

    def _drop(self) -> None:
        if self._record is not None and self._name:
            self._record.folder.snapshots.drop(self._name)


class SaveJob:
    """What one keeper saves. **Rank-local**: rank 0 alone has one, and runs it on any thread.

    Args:
        kept: Observation whose weights are saved, and what follows from it.
        snapshot: Snapshot of the weights.
        record: Record of the keeper.
        is_first: Whether this keeper took the snapshot, rather than another one at the same iteration.
        on_commit: Function that is called with the name of the snapshot once it is committed as a new best.

    Attributes:
        is_skipped: Whether the snapshot was given up, which is recorded also where the disk refuses it.
    """

    def __init__(
        self,
        kept: Kept,
        snapshot: PendingSnapshot,
        record: KeeperRecord,
        *,
        is_first: bool,
        on_commit: Callable[[str], None],
    ) -> None:
        self._kept = kept
        self._snapshot = snapshot
        self._record = record
        self._is_first = is_first
        self._on_commit = on_commit
        self.is_skipped = False
        if not is_first:
            snapshot.need()

    def run(self) -> None:
        """Write the snapshot and commit it, or record that it was skipped, if it was given up.

        Raises:
            OSError: Any refusal of the file system. Nothing was saved or recorded then, unless it `is_skipped`.
        """
        self.is_skipped = self._is_first and not self._snapshot.begin()
        if self.is_skipped:
            self._record.supersede(self._kept.observation)
            return
        if self._snapshot.commit(partial(self._record.keep, self._kept)):  # as a new best
            self._on_commit(self._snapshot.name)


def _of_rank_0(record: Record | None) -> Record:
    if record is None:
        raise RuntimeError("only rank 0 completes a snapshot")
    return record

"""The run folder of rank 0: one lock, one ledger, and what follows from each of its lines.

A commit is a ledger line that is synced to the disk. After it refs move, the remote copy, if there is one, gets the new
state, and snapshots that nothing names any more are removed. Opening a folder after a crash only ever rolls forward
from the last line.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from keepbest.errors import ConfigError, LedgerError, RunExistsError
from keepbest.iteration import TrainingIteration
from keepbest.run.aside import move_aside
from keepbest.run.events import Event, RunBegan, SessionBegan
from keepbest.run.files import Files
from keepbest.run.follower import Committed, Follower
from keepbest.run.history import History
from keepbest.run.layout import CHECKPOINTS, LEDGER, LOCK, SNAPSHOTS, unfinished_folder
from keepbest.run.ledger import LedgerFile, read_ledger
from keepbest.run.lines import SENSELESS
from keepbest.run.lock import RunLock
from keepbest.run.lost_ledger import describe_unknown, unknown_snapshots
from keepbest.run.no_links import check_frame
from keepbest.run.place import check_can_be_made, run_around
from keepbest.run.ref_links import RefLinks
from keepbest.run.snapshot_folder import SnapshotFolder
from keepbest.user_code import Log

_logger = Log(__name__)


class RunFolder:
    """`<run>/checkpoints`, owned by this process. **Rank-local**: rank 0 alone has one.

    It begins with `claim`. Nothing is changed before `open`, so that a folder of another run stays as it is.

    Args:
        directory: Directory of the run.
        files: Operations that change the folder.
        copy: Remote copy that follows each commit.
        lock: Function that makes the lock at a path.

    Attributes:
        path: Path of the folder.
        files: As passed.
        copy: As passed.
        snapshots: Folder of the snapshots.
        history: What the events of the ledger add up to.
        is_resumed: Whether something had been observed in the run before this process opened it.
    """

    def __init__(
        self,
        directory: Path,
        files: Files,
        copy: Follower | None = None,
        *,
        lock: Callable[[Path], RunLock] = RunLock,
    ) -> None:
        self.path = directory / CHECKPOINTS
        self.files = files
        self.copy = copy
        self.snapshots = SnapshotFolder(files, self.path / SNAPSHOTS)
        self._links = RefLinks(files, self.path)
        self._is_interrupted = False
        self._is_followed = False
        self._is_claimed = False
        self._under_way: str | None = None  # name of the snapshot that is being saved
        self._new_lock = lock
        self._lock = lock(self.path / LOCK)
        self._ledger: LedgerFile | None = None
        self._held: list[str] = []  # once for each that needs it
        self.history = History()
        self.is_resumed = False

    def claim(self) -> None:
        """Lock the folder for this process, and read it. What fails here is released by `close`.

        Raises:
            RunExistsError: If another process owns the folder.
            ConfigError: If it is inside of the folder of another run, or a file.
            LedgerError: If the ledger is damaged or of another version, or the folder is made of links.
            OSError: Any refusal of the file system.
        """
        if self._is_claimed:
            return
        if (run := run_around(self.path.parent)) is not None:
            raise ConfigError(
                f"{self.path.parent} is inside of a run; give the run itself, {run}, or another directory"
            )
        check_can_be_made(self.path.parent)
        check_frame(self.path.parent)
        self.files.make_folder(self.path / SNAPSHOTS)
        self._lock.acquire()
        self._read()
        self._is_claimed = True

    def set_aside(self, *beside: str) -> None:
        """Move the run to a free directory beside its own, and begin anew here, before `open`. A warning says where.

        Args:
            *beside: Names of what else belongs to the run in its directory.

        Raises:
            RunExistsError: If the remote copy holds a run, or another process begins one here at this moment.
            OSError: Any refusal of the file system, or of the remote storage.
        """
        if self.copy is not None and self.copy.holds_run():
            raise RunExistsError(
                f"{self.copy.url} holds a run, and what is there is not set aside: give the new run another remote"
            )
        self.snapshots.finish_removal()
        old, self._is_claimed = self._lock, False
        try:
            to = move_aside(self.path.parent, (*beside, CHECKPOINTS), self.files)
            _logger.warning("%s: run %s was set aside, and is in %s", self.path.parent, self.history.run_id, to)
            self.files.make_folder(self.path / SNAPSHOTS)
            self._lock = self._new_lock(self.path / LOCK)
            self._lock.acquire()
        finally:
            old.release()  # not earlier, so that a process that waits for it finds the new one held
        self.snapshots = SnapshotFolder(self.files, self.path / SNAPSHOTS)
        self._read()
        self._is_claimed = True

    @property
    def is_open(self) -> bool:
        """Whether something is recorded here by now."""
        return self._ledger is not None

    def check_is_whole(self) -> None:
        """Check that the ledger is the one that the folder was written with. Raises `LedgerError`."""
        if unknown := unknown_snapshots(self.snapshots, self._links, self.history, self._ledger_bytes):
            raise LedgerError(f"{describe_unknown(self.path, unknown)}; nothing was changed")

    def bring_up_to_copy(self, check: Callable[[str | Path, History], None]) -> bool:
        """Before the first commit: bring the folder up to its remote copy, which follows from now on.

        Args:
            check: Function that raises if a run that is found in the copy may not be continued.

        Returns:
            Whether there is a remote copy that did not follow before.

        Raises:
            SnapshotError: If the copy cannot be read, or is damaged.
            LedgerError: If it and the folder have gone different ways.
            OSError: Any refusal of the file system.
        """
        if self.copy is None or self._is_followed:
            return False
        if self.copy.bring_up(self.path, self.files, self._ledger_bytes, check):
            self._read()
        self.copy.begin(self.path, self.history, self._lock.note)
        self._is_followed = True
        return True

    def open(self, run_id: str | None) -> None:
        """Get ready to record: in the run that is there, or in a new one of this id. Raises `OSError`."""
        if self._ledger is not None:
            return
        self._ledger = LedgerFile(self.files, self.path / LEDGER, self._ledger_bytes)
        # A start that was cut off may have made the ledger and the folders, and not have waited for the disk.
        for folder in (self.path, *self.path.parents[:2]):
            self.files.sync_folder(folder)
        if self.history.run_id is None:
            self.append(RunBegan(run_id or uuid.uuid4().hex), durable=True)
        else:
            self.append(SessionBegan(self.history.restarts + 1))
        self._links.restore(self.history.refs)

    def append(self, event: Event, *, durable: bool = False, withdraw: bool = False) -> None:
        """Record an event from which nothing follows on the disk.

        An interruption does not withdraw it: it counts, and is recorded as soon as anything else is.

        Args and errors as `LedgerFile.append`.
        """
        if self._ledger is None:
            raise RunExistsError(f"{self.path} is closed: start a keeper before it records anything")
        try:
            self.catch_up()
        except OSError:
            if not withdraw:
                self._ledger.owe(event)
            raise
        history = self.history
        history.check(event)
        self._is_interrupted = True
        try:
            self._ledger.append(event, durable=durable, withdraw=withdraw)
        except OSError:
            self._know(history, None if withdraw else event)
            raise
        except SENSELESS:
            self._know(history, None)
            raise
        self._know(history, event)

    def commit(self, event: Event, *, withdraw: bool = False) -> None:
        """Make an event durable, then do what follows: refs move, and what nothing names any more is removed.

        Raises:
            OSError: As `LedgerFile.append`. What was committed stays committed, also if later steps are refused.
        """
        self.append(event, durable=True, withdraw=withdraw)
        self._or_warn(self._show_and_collect)

    def hold(self, snapshot: str) -> None:
        """Keep a snapshot, even if nothing names it any more, until `let_go`."""
        self._held.append(snapshot)

    def let_go(self, snapshot: str) -> None:
        """End a `hold`, and remove the snapshot if nothing names it any more."""
        self._held.remove(snapshot)
        # The line that could not be taken back may name what is not known here.
        if snapshot not in self.history.kept() and not self.is_torn:
            self._or_warn(self._collect)

    def catch_up(self) -> None:
        """Bring what is known up to the ledger, where an interruption came between the two.

        Raises:
            OSError: Any refusal of the file system.
        """
        if self._is_interrupted and self._ledger is not None:
            known = self.history
            self._ledger.sync()
            events, _ = read_ledger(self.path / LEDGER)
            read = History.of(events, self.path / LEDGER)
            # A handler of a signal may have read more in the middle.
            self.history = read if self.history is known else self.history
            self._is_interrupted = False

    @property
    def run_id(self) -> str:
        """The id of the run that the folder holds."""
        if self.history.run_id is None:
            raise RuntimeError(f"{self.path} holds no run yet: begin comes first")
        return self.history.run_id

    def new_name(self, iteration: TrainingIteration, selection: str) -> str:
        """A name for a snapshot of `iteration`; `selection` is what is saved."""
        return self.snapshots.new_name(iteration, self.history.restarts, selection, self.history.manifests)

    def begin_snapshot(self, name: str) -> None:
        """Make the empty folder for the files of a snapshot, unless the run is somewhere else now. Raises `OSError`."""
        if self._ledger is not None:
            # Else a run that was moved away would get another folder in its old place, and could not be moved back.
            self._ledger.check_is_in_place()
        self._under_way = name
        self.snapshots.begin(name)

    def end_snapshot(self) -> None:
        """What was begun is committed, or it is not needed any more."""
        self._under_way = None

    @property
    def durable_bytes(self) -> int:
        """The bytes of the ledger that are known to be on the disk."""
        return 0 if self._ledger is None else self._ledger.durable_size

    @property
    def is_torn(self) -> bool:
        """Whether a line that was refused may still be read, since it could not be taken back either."""
        return self._ledger is None or self._ledger.is_torn

    def sync(self) -> None:
        """Make all observations durable, and wait until the space of removed snapshots is free. Raises `OSError`."""
        self.snapshots.finish_removal()
        if self._ledger is not None:
            self._ledger.sync()

    def follow_now(self) -> None:
        """Let the remote copy follow a run that no keeper writes to. Raises as `bring_up_to_copy`."""
        if self.copy is not None:
            self.copy.follow(self._committed(self._ledger_bytes))

    def repair(self) -> None:
        """Finish or undo what a crash left, as a resume would: a torn line, refs that lag, and unneeded snapshots.

        Raises:
            LedgerError: If the ledger is not the one that the folder was written with.
            OSError: Any refusal of the file system.
        """
        self.check_is_whole()
        if self.history.run_id is None:
            return
        LedgerFile(self.files, self.path / LEDGER, self._ledger_bytes).close()
        self._links.restore(self.history.refs)
        self.snapshots.remove_all_but(self.history.kept())
        self.snapshots.finish_removal()
        self._links.show(self.history.refs)  # those for which there was no room before

    def close(self) -> None:
        """Release the folder for other processes. A second call does nothing, unless the first one was interrupted."""
        with ExitStack() as steps:  # the last one first, and each of them even if others fail
            steps.callback(self._lock.release)
            steps.callback(self.snapshots.finish_removal)
            try:
                self._close_ledger()
            except BaseException as error:
                if not isinstance(error, Exception):
                    steps.pop_all()  # interrupted: the next call may still write, so the lock stays
                raise

    def _close_ledger(self) -> None:
        for snapshot in list(self._held):  # by a keeper that was dropped without an end
            self.let_go(snapshot)
        try:
            try:
                self._stop_following()
            finally:
                if self._ledger is not None:
                    self._ledger.close()
        except OSError as error:
            # What must be on the disk is synced when it is written. The rest may be lost, as it may be in a crash.
            _logger.warning("%s: the newest observations may be lost: %s", self.path, error)

    def _know(self, history: History, event: Event | None) -> None:
        """What was begun in the ledger is over: `event` counts, or nothing does."""
        if event is not None:
            history.take(event)
        # A handler of a signal may have read the ledger in the middle, with this event in it or not yet.
        self._is_interrupted = self.history is not history

    def _read(self) -> None:
        events, self._ledger_bytes = read_ledger(self.path / LEDGER)
        self.history = History.of(events, self.path / LEDGER)
        self.is_resumed = not self.history.is_empty

    def _or_warn(self, follow: Callable[[], None]) -> None:
        try:
            follow()
        except (OSError, LedgerError) as error:  # of a ledger that changed, the next commit raises
            _logger.warning("%s: what is no longer needed stays until the next save: %s", self.path, error)

    def _show_and_collect(self) -> None:
        self.catch_up()
        self._links.show(self.history.refs)
        self._collect()

    def _collect(self) -> None:
        """Remove snapshots that nothing names; those that are held or that the remote copy still needs stay."""
        self.catch_up()
        kept = self.history.kept() | set(self._held)
        if self._under_way is not None:  # a handler of a signal commits something in the middle of a save
            kept |= {self._under_way, unfinished_folder(self.path, self._under_way).name}
        if self.copy is not None and self._is_followed and self._ledger is not None:
            self.copy.follow(self._committed(self._ledger.size))
            kept |= self.copy.held()
        self.snapshots.remove_all_but(kept)

    def _committed(self, ledger_bytes: int) -> Committed:
        manifests = self.history.manifests
        kept = {name: manifests[name] for name in self.history.copied()}
        return Committed(self.history.run_id, ledger_bytes, kept, frozenset(manifests))

    def _stop_following(self) -> None:
        if self.copy is None:
            return
        try:
            if self._is_followed and self._ledger is not None:
                self.catch_up()
                self._ledger.sync()
                self._collect()
        finally:
            self.copy.close()
            self._is_followed = False
        if self._ledger is not None:
            self._collect()

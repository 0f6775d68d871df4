"""What is recorded of a run becomes durable here, one ledger line at a time, and what follows from the line is done.

A line that is synced is a commit. Then refs move, the remote copy, if there is one, is told, and what nothing names any
more is removed. Opening a folder after a crash only ever rolls forward from the last line.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from pathlib import Path

from keepbest.errors import ConfigError, LedgerError, RunExistsError
from keepbest.remote.download import bring_up_to, told_as_unreadable
from keepbest.remote.storage import Remote
from keepbest.remote.upload import Committed, Mirror, snapshot_in
from keepbest.run.files import Files
from keepbest.run.history import History, run_line
from keepbest.run.layout import LEDGER, LOCK
from keepbest.run.ledger import LedgerFile, Line, read_ledger
from keepbest.run.lock import RunLock
from keepbest.run.ref_links import RefFolder
from keepbest.run.snapshot_folder import SnapshotFolder

_logger = logging.getLogger(__name__)


class Commits:
    """The ledger of one run, and whatever it rules. **Rank-local**, on rank 0.

    Args:
        folder: `<run>/checkpoints`.
        files: by which it is changed.
        snapshots: in it.
        remote: URL of a copy that follows each commit.

    Attributes:
        history: what the ledger tells.
        is_taken_up: whether something had been observed in the run before this process took it up.

    Raises:
        ConfigError: if the remote storage cannot be opened here.
        RunExistsError: if another process owns the folder.
        LedgerError: if the ledger is damaged or of another format.
        OSError: whatever the file system answers.
    """

    def __init__(self, folder: Path, files: Files, snapshots: SnapshotFolder, remote: str | None) -> None:
        self._folder = folder
        self._files = files
        self._snapshots = snapshots
        self._refs = RefFolder(files, folder)
        self._refs_lag = False
        self._remote = None if remote is None else Remote(remote)
        if self._remote is not None and self._remote.is_at(folder):
            raise ConfigError(f"{remote} is the directory of the run itself: a copy goes elsewhere")
        self._mirror: Mirror | None = None
        self._lock = RunLock(folder / LOCK)
        try:
            self._read()
        except BaseException:
            self._lock.release()
            raise
        self._ledger: LedgerFile | None = None

    def take_up_remote(self, check: Callable[[str, History], None]) -> bool:
        """Before the first commit: bring the run up to its remote copy, which follows from now on.

        Args:
            check: raises if a run that is found at a URL may not be gone on with.

        Returns:
            Whether there is a remote copy that did not follow before.

        Raises:
            SnapshotError: if the remote copy cannot be read, or is damaged.
            LedgerError: if it and the folder have gone different ways.
            OSError: whatever the file system answers.
        """
        if self._remote is None or self._mirror is not None:
            return False
        if bring_up_to(self._remote, self._folder, self._files, self._ledger_bytes, check):
            self._read()
        with told_as_unreadable(self._remote):
            found = self._remote.sizes()
        known = self.history.manifests if LEDGER in found else {}
        arrived = frozenset(path for path in found if snapshot_in(path) in known)
        self._mirror = Mirror(self._remote, self._folder, arrived=arrived)
        return True

    def check_is_whole(self) -> None:
        """See whether the ledger is the one that the folder was written with. Raises `LedgerError`."""
        # The ledger knows every snapshot before anything points at it, so what it does not know is not garbage here: it
        # is what a ledger that was lost, or replaced by an older one, knew.
        unknown = self._snapshots.names() - self.history.manifests.keys()
        lost = unknown if self.history.run_id is None else unknown & self._refs.targets()
        if lost:
            raise LedgerError(
                f"{self._folder / LEDGER} does not know the snapshots {', '.join(sorted(lost))}: it was lost, or is an "
                "older copy. Restore it, or choose another directory; nothing was changed"
            )

    def open(self, run_id: str | None) -> None:
        """Get ready to record, in a new run of this id, if there is none in the folder. Raises `OSError`."""
        if self._ledger is not None:
            return
        self._ledger = LedgerFile(self._files, self._folder / LEDGER, self._ledger_bytes)
        if self.history.run_id is None:
            self.append(run_line(run_id or uuid.uuid4().hex), durable=True)
            self._files.sync_folder(self._folder)
        else:
            self.append({"event": "session", "restart": self.history.restarts + 1})
        self._refs.restore(self.history.refs)

    def append(self, line: Line, *, durable: bool = False, withdraw: bool = False) -> None:
        """Record a line from which nothing follows on the disk. As `LedgerFile.append`."""
        if self._ledger is None:
            raise RunExistsError(f"{self._folder} is closed: begin a keeper before it records anything")
        try:
            self._ledger.append(line, durable=durable, withdraw=withdraw)
        except OSError:
            if not withdraw:
                self.history.apply(line)
                self._refs_lag = True
            raise
        self.history.apply(line)

    def commit(self, line: Line, *, withdraw: bool = False) -> None:
        """Make a line durable; then, what follows from it: refs move, and what nothing names any more is removed.

        Raises:
            OSError: as `LedgerFile.append`; what was committed stays committed, whatever else is refused.
        """
        self.append(line, durable=True, withdraw=withdraw)
        try:
            if self._refs_lag:
                self._refs.restore(self.history.refs)
            else:
                self._refs.move(line.get("refs", {}))
            self._collect()
            self._refs_lag = False
        except OSError as error:
            # Refs and garbage are brought up to the ledger by the next commit.
            self._refs_lag = True
            _logger.warning("%s: the ledger is ahead of the refs until the next save: %s", self._folder, error)

    @property
    def is_torn(self) -> bool:
        """Whether a line that was refused may still be read, since it could not be taken back either."""
        return self._ledger is None or self._ledger.is_torn

    def sync(self) -> None:
        """Make all lines durable. Raises `OSError`."""
        if self._ledger is not None:
            self._ledger.sync()

    def upload(self) -> None:
        """Bring a run that nobody is at work on to its remote copy.

        Raises:
            RunExistsError: if the copy is ahead of the folder.
            LedgerError: if the two have gone different ways, or the ledger is not that of the folder.
            SnapshotError: if the copy cannot be read.
            OSError: if it cannot be written.
        """

        def refuse(place: str, _: History) -> None:
            raise RunExistsError(f"{place} is ahead of {self._folder}; a resume of the run would bring that up to it")

        self.take_up_remote(refuse)
        self.check_is_whole()
        if self._mirror is not None:
            self._mirror.follow(self._committed(self._ledger_bytes))
        self.arrive()

    def arrive(self) -> None:
        """Wait until the remote copy, if there is one, has all that was committed. Raises `OSError`."""
        if self._mirror is not None:
            self._mirror.arrive()

    @property
    def upload_failure(self) -> OSError | None:
        """Why the remote copy lags behind, if it does."""
        return None if self._mirror is None else self._mirror.failure

    def repair(self) -> None:
        """Finish or undo what a crash left, as a resume would: a torn line, refs that lag, what no ref needs.

        Raises:
            LedgerError: if the ledger is not the one that the folder was written with.
            OSError: whatever the file system answers.
        """
        self.check_is_whole()
        if self.history.run_id is None:
            return
        LedgerFile(self._files, self._folder / LEDGER, self._ledger_bytes).close()
        self._refs.restore(self.history.refs)
        self._snapshots.remove_all_but(self.history.kept())
        self._snapshots.finish_removal()

    def close(self) -> None:
        """Give the folder free for other processes; a second call does nothing."""
        try:
            try:
                self._stop_following()
            finally:
                if self._ledger is not None:
                    self._ledger.close()
        except OSError as error:
            # Who waits for a line syncs it; what was not synced may be lost, as it may be in a crash.
            _logger.warning("%s: the newest observations may be lost: %s", self._folder, error)
        finally:
            self._snapshots.finish_removal()
            self._lock.release()

    def _read(self) -> None:
        lines, self._ledger_bytes = read_ledger(self._folder / LEDGER)
        self.history = History.of(lines)
        self.is_taken_up = not self.history.is_empty

    def _collect(self) -> None:
        """Remove what nothing needs, but for what is still being brought to the remote storage."""
        kept = self.history.kept()
        if self._mirror is not None and self._ledger is not None:
            self._mirror.follow(self._committed(self._ledger.size))
            kept |= self._mirror.held()
        self._snapshots.remove_all_but(kept)

    def _committed(self, ledger_bytes: int) -> Committed:
        manifests = self.history.manifests
        return Committed(
            self.history.run_id,
            ledger_bytes,
            {name: manifests[name] for name in self.history.kept()},
            frozenset(manifests),
        )

    def _stop_following(self) -> None:
        if self._mirror is None:
            return
        try:
            if self._ledger is not None:
                self._ledger.sync()
                self._collect()
        finally:
            self._mirror.close()
            self._mirror = None
        if self._ledger is not None:
            self._collect()

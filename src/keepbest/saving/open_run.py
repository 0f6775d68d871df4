"""A run folder as this process has it open: what the keepers in it share."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path

from keepbest.errors import ConfigError
from keepbest.iteration import TrainingIteration
from keepbest.remote.copy import FollowingCopy
from keepbest.run.files import Files
from keepbest.run.folder import RunFolder
from keepbest.run.lock import RunLock
from keepbest.saving.job import PendingSnapshot
from keepbest.worker import Inline, Threaded, Worker

Clock = Callable[[], float]


class OpenRun:
    """The same object for every keeper of this process in one run folder.

    All ranks have one, since all must know when a snapshot can be shared. That of rank 0 also has the folder.

    Args:
        directory: Directory of the run.
        files: Operations that change the folder.
        clock: Seconds that pass, for what follows here.
        patience: Seconds for which the upload to a remote copy is tried again.
        lock_patience: Seconds to wait for a process of this host that has the folder, and may be on its way out.

    Attributes:
        directory: As passed.
        files: As passed, or those of this machine.
        remote: URL of a copy of the run; `None` if there is none.
        folder: On rank 0, the run folder; `None` before `open_folder` and elsewhere.
        worker: Who writes into the folder.
    """

    def __init__(
        self,
        directory: Path,
        *,
        files: Files | None = None,
        clock: Clock = time.monotonic,
        patience: float = 300.0,
        lock_patience: float = 15.0,
    ) -> None:
        self.directory = directory
        self.remote: str | None = None
        self.folder: RunFolder | None = None
        self.worker: Worker = Inline()
        self.files = files or Files()
        self._clock = clock
        self._patience = patience
        self._lock_patience = lock_patience
        self._keepers: set[str] = set()
        self._newest: tuple[TrainingIteration, Hashable, PendingSnapshot, str] | None = None

    def share(self) -> OpenRun:
        """The one that everybody in this directory shares: this one, unless somebody holds another. **Rank-local**."""
        return _open_runs.setdefault(self.directory.resolve(), self)

    def open_folder(self) -> RunFolder:
        """The folder, opened if need be, when nothing is being written into it. **Rank-local**, on rank 0.

        Raises as `RunFolder`.
        """
        self.worker.drain()
        if self.folder is None:
            copy = None if self.remote is None else FollowingCopy(self.remote, self._clock, self._patience)
            lock = partial(RunLock, patience=self._lock_patience, clock=self._clock)
            self.folder = RunFolder(self.directory, self.files, copy, lock=lock)
        return self.folder

    def write_in_the_background(self) -> None:
        """From now on, do the writing on a thread. **Rank-local**, on rank 0."""
        if isinstance(self.worker, Inline):
            self.worker = Threaded("keepbest-writer")

    def join(self, keeper: str, remote: str | None) -> None:
        """Let `keeper`, which wants a copy of the run at `remote`, work here. **Rank-local**, on every rank.

        Raises:
            ConfigError: If there is one of this name already, or one that wants the copy elsewhere.
        """
        if keeper in self._keepers:
            raise ConfigError(f"two keepers of this run are named {keeper!r}; give one of them an id")
        if self._keepers and remote != self.remote:
            raise ConfigError(
                f"{keeper} has remote={remote!r}, and other keepers in {self.directory} have {self.remote!r}: a run "
                "has one remote copy, so give all of its keepers the same"
            )
        self.remote = remote
        self._keepers.add(keeper)

    def leave(self, keeper: str) -> None:
        """Let `keeper` go; the last one waits for the worker and releases the folder. **Rank-local**, on every rank."""
        self._keepers.discard(keeper)
        if self._keepers:
            return
        self._newest = None
        self.worker.close()
        self.worker = Inline()
        if self.folder is not None:
            self.folder.close()
            self.folder = None

    @property
    def is_shared(self) -> bool:
        """Whether several keepers work here, on every rank alike."""
        return len(self._keepers) > 1

    def remember(self, iteration: TrainingIteration, content: Hashable, snapshot: PendingSnapshot, mark: str) -> None:
        """Note which snapshot holds `content` as it was at `iteration`, and the mark of this rank's weights then."""
        self._newest = (iteration, content, snapshot, mark)

    def snapshot_with(self, iteration: TrainingIteration, content: Hashable) -> tuple[PendingSnapshot, str] | None:
        """The snapshot that was just taken of the same content at the same iteration, if there is one, and the mark."""
        if self._newest is not None and self._newest[:2] == (iteration, content):
            return self._newest[2:]
        return None


# One folder, lock and ledger for a directory in a process, for as long as a keeper holds it.
_open_runs: weakref.WeakValueDictionary[Path, OpenRun] = weakref.WeakValueDictionary()

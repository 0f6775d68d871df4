"""What the keepers of one process share when they keep their bests in the same run folder."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path

from keepbest.errors import ConfigError
from keepbest.iteration import TrainingIteration
from keepbest.run.record import Store
from keepbest.saving.writer import Job, Writer


@dataclass(slots=True)
class Ticket:
    """A snapshot that is, or will be, on the disk.

    Attributes:
        snapshot: its name; `None` until it is durable, and on ranks other than 0.
        is_named: whether something that was queued after it needs it.
    """

    snapshot: str | None = None
    is_named: bool = False


class SharedRun:
    """One run folder as this process sees it; the same object for every keeper in it.

    All ranks have one, since all must know when a snapshot can be shared; rank 0's also has the store.

    Attributes:
        directory: of the run.
        remote: URL of a copy of it; `None` if there is none.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.remote: str | None = None
        self._store: Store | None = None
        self._writer: Writer | None = None
        self._keepers: set[str] = set()
        self._newest: tuple[TrainingIteration, Hashable, Ticket] | None = None

    @classmethod
    def of(cls, directory: Path) -> SharedRun:
        """The one for `directory`. **Rank-local**."""
        resolved = directory.resolve()
        run = _shared_runs.get(resolved)
        if run is None:
            run = _shared_runs[resolved] = cls(directory)
        return run

    def store(self) -> Store:
        """The store, opened on first use, when nothing is queued for it any more. For rank 0 only.

        Raises as `Store` does.
        """
        if self._writer is not None:
            self._writer.drain()
        if self._store is None:
            self._store = Store(self.directory, remote=self.remote)
        return self._store

    def write_in_the_background(self) -> None:
        """From now on, do what is submitted on a thread. For rank 0 only."""
        if self._writer is None:
            self._writer = Writer("keepbest-writer")

    def submit(self, work: Callable[[Store], None], failed: Callable[[Exception], None]) -> Job:
        """Have something written: at once, or, with a writer, after all that was submitted before. For rank 0 only.

        Args:
            work: writes.
            failed: is told if it could not.
        """
        store = self._store if self._writer is not None and self._store is not None else self.store()
        job = Job(lambda: work(store), failed)
        if self._writer is not None:
            self._writer.submit(job)
            return job
        job.is_started = True
        try:
            job.work()
        except Exception as error:  # noqa: BLE001  # raised again on every rank, at the next exchange
            job.failed(error)
        return job

    def replace(self, job: Job, work: Callable[[Store], None]) -> bool:
        """Have `job` do something else, if it was not begun. Returns whether it will. For rank 0 only."""
        store = self._store
        return self._writer is not None and store is not None and self._writer.replace(job, lambda: work(store))

    @property
    def upload_failure(self) -> OSError | None:
        """Why the remote copy lags behind, if it does. **Rank-local**."""
        return None if self._store is None else self._store.upload_failure

    def join(self, keeper: str, remote: str | None) -> None:
        """`keeper`, which wants a copy of the run at `remote`, takes up its work. **Rank-local**, on every rank.

        Raises:
            ConfigError: if there is one of this name already, or one that wants the copy elsewhere.
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
        """`keeper` is done; the last one waits for the writer and gives the folder free. **Rank-local**, every rank."""
        self._keepers.discard(keeper)
        if self._keepers:
            return
        self._newest = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._store is not None:
            self._store.close()
            self._store = None

    def remember(self, iteration: TrainingIteration, content: Hashable, ticket: Ticket) -> None:
        """Note which snapshot holds `content`, as it was at `iteration`."""
        self._newest = (iteration, content, ticket)

    def snapshot_with(self, iteration: TrainingIteration, content: Hashable) -> Ticket | None:
        """The snapshot that was just taken of the same content at the same iteration, if there is one."""
        if self._newest is not None and self._newest[:2] == (iteration, content):
            return self._newest[2]
        return None


# One store, lock and ledger for a folder in a process, for as long as a keeper holds it.
_shared_runs: weakref.WeakValueDictionary[Path, SharedRun] = weakref.WeakValueDictionary()

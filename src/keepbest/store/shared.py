"""What the keepers of one process share when they keep their bests in the same run folder."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from pathlib import Path

from keepbest.errors import ConfigError
from keepbest.iteration import TrainingIteration
from keepbest.store.store import Store


class SharedRun:
    """One run folder as this process sees it; the same object for every keeper in it.

    All ranks have one, since all must know when a snapshot can be shared; rank 0's also has the store.

    Attributes:
        directory: of the run.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._store: Store | None = None
        self._keepers: set[str] = set()
        self._newest: tuple[TrainingIteration, Hashable, str] | None = None

    @classmethod
    def of(cls, directory: Path) -> SharedRun:
        """The one for `directory`. **Rank-local**."""
        resolved = directory.resolve()
        run = _shared_runs.get(resolved)
        if run is None:
            run = _shared_runs[resolved] = cls(directory)
        return run

    def store(self) -> Store:
        """The store, opened on first use. For rank 0 only. Raises as `Store` does."""
        if self._store is None:
            self._store = Store(self.directory)
        return self._store

    def join(self, keeper: str) -> None:
        """`keeper` takes up its work. **Rank-local**, on every rank.

        Raises:
            ConfigError: if there is one of this name already.
        """
        if keeper in self._keepers:
            raise ConfigError(f"two keepers of this run are named {keeper!r}; give one of them an id")
        self._keepers.add(keeper)

    def leave(self, keeper: str) -> None:
        """`keeper` is done; with the last one the folder is given free. **Rank-local**, on every rank."""
        self._keepers.discard(keeper)
        if not self._keepers:
            self._newest = None
            if self._store is not None:
                self._store.close()
                self._store = None

    def remember(self, iteration: TrainingIteration, content: Hashable, snapshot: str) -> None:
        """Note which snapshot holds `content`, as it was at `iteration`."""
        self._newest = (iteration, content, snapshot)

    def snapshot_with(self, iteration: TrainingIteration, content: Hashable) -> str | None:
        """The snapshot that was just taken of the same content at the same iteration, if there is one."""
        if self._newest is not None and self._newest[:2] == (iteration, content):
            return self._newest[2]
        return None


# One store, lock and ledger for a folder in a process, for as long as a keeper holds it.
_shared_runs: weakref.WeakValueDictionary[Path, SharedRun] = weakref.WeakValueDictionary()

"""The remote copy of a run that a run folder is given: it is read at the start, and follows each commit after that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from keepbest.errors import ConfigError
from keepbest.remote.download import bring_up_to, raising_unreadable, read_remote_ledger
from keepbest.remote.mirror import Mirror
from keepbest.remote.storage import Remote, snapshot_in
from keepbest.run.files import Files
from keepbest.run.follower import Committed, Note
from keepbest.run.history import History
from keepbest.run.layout import LEDGER


class FollowingCopy:
    """A `Follower` at a URL that fsspec knows. **Rank-local**, on rank 0.

    Args:
        url: URL of the run.
        clock: Function that gives seconds.
        patience: Seconds for which an upload is tried again without getting ahead.

    Raises:
        ConfigError: If the remote storage cannot be opened here.
    """

    def __init__(self, url: str, clock: Callable[[], float], patience: float) -> None:
        self.url = url
        self._remote = Remote(url)
        self._clock = clock
        self._patience = patience
        self._mirror: Mirror | None = None

    def holds_run(self) -> bool:
        return bool(read_remote_ledger(self._remote))

    def bring_up(
        self, folder: Path, files: Files, ledger_bytes: int, check: Callable[[str | Path, History], None]
    ) -> bool:
        """Bring the run folder up to the copy. Raises as `bring_up_to`; `ConfigError` if the copy is the folder."""
        if self._remote.is_at(folder):
            raise ConfigError(f"{self.url} is the directory of the run itself: a copy goes elsewhere")
        return bring_up_to(self._remote, folder, files, ledger_bytes, check)

    def begin(self, folder: Path, history: History, note: Note) -> None:
        with raising_unreadable(self._remote):
            found = self._remote.sizes()
        known = history.manifests if LEDGER in found else {}
        arrived = frozenset(path for path in found if snapshot_in(path) in known)
        self._mirror = Mirror(
            self._remote, folder, arrived=arrived, note=note, clock=self._clock, patience=self._patience
        )

    def follow(self, committed: Committed) -> None:
        if self._mirror is not None:
            self._mirror.follow(committed)

    def held(self) -> set[str]:
        return set() if self._mirror is None else self._mirror.held()

    @property
    def failure(self) -> OSError | None:
        """Why the copy lags behind, if it does."""
        return None if self._mirror is None else self._mirror.failure

    def arrive(self) -> None:
        if self._mirror is not None:
            self._mirror.arrive()

    def close(self) -> None:
        if self._mirror is not None:
            self._mirror.close()
            self._mirror = None

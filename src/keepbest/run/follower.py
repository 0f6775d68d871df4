"""What a run folder asks of the remote copy that follows it. `keepbest.remote` has the copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from keepbest.run.files import Files
from keepbest.run.history import History

Note = Callable[[str, Sequence[str]], None]
"""What learns the URL of the copy, and the names of the snapshots that are being brought there."""


class Committed(NamedTuple):
    """A state of the run folder.

    Attributes:
        run_id: Id of the run.
        ledger_bytes: Bytes of the ledger, all of them durable.
        kept: Name and digest of the manifest of each snapshot that the copy has.
        known: Names of all snapshots that the ledger mentions.
    """

    run_id: str | None = None
    ledger_bytes: int = 0
    kept: Mapping[str, str] = {}
    known: frozenset[str] = frozenset()


class Follower(Protocol):
    """A copy of a run elsewhere. **Rank-local**, on rank 0."""

    @property
    def url(self) -> str:
        """The place of the copy, for messages and comparisons."""

    @property
    def failure(self) -> OSError | None:
        """Why the copy lags behind, if it does."""

    def holds_run(self) -> bool:
        """Whether there is a run in the copy. Raises `SnapshotError` if it cannot be read."""

    def bring_up(
        self, folder: Path, files: Files, ledger_bytes: int, check: Callable[[str | Path, History], None]
    ) -> bool:
        """Bring the run folder up to the copy, where the copy is ahead; returns whether the ledger changed.

        Raises:
            SnapshotError: If the copy cannot be read, or is damaged.
            LedgerError: If the two have gone different ways.
            OSError: Any refusal of the file system.
        """

    def begin(self, folder: Path, history: History, note: Note) -> None:
        """Start to follow the run folder. Raises `SnapshotError` if the copy cannot be read."""

    def follow(self, committed: Committed) -> None:
        """Bring this state to the copy, soon."""

    def held(self) -> set[str]:
        """The snapshots that must stay in the run folder, since they are on their way or will be."""

    def arrive(self) -> None:
        """Wait until the newest state has arrived. Raises `OSError` if it cannot."""

    def close(self) -> None:
        """Wait for what is under way, but not for long, and end. A second call does nothing."""

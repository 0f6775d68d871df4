"""Brings what is committed in a run folder to a remote storage, on a thread of its own.

What a ledger names has arrived before the ledger does; what it does not name any more is removed after. So whenever the
run is cut off, the remote ledger tells an earlier state of the run, and all of it is there.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from keepbest.errors import LedgerError
from keepbest.store.layout import LEDGER, SNAPSHOTS
from keepbest.store.remote import Remote
from keepbest.store.writer import Job, Writer

_logger = logging.getLogger(__name__)
_LAST_PATIENCE = 30.0
# What waiting does not mend, as long as nothing has ever arrived: a bucket that is not there, or is somebody else's.
_WRONG_PLACE = (FileNotFoundError, PermissionError)


class Committed(NamedTuple):
    """A state of the run folder.

    Attributes:
        ledger_bytes: of the ledger, all of them durable.
        snapshots: that must stay, according to it.
    """

    ledger_bytes: int = 0
    snapshots: frozenset[str] = frozenset()


class Mirror:
    """Follows the commits of a run folder with a remote copy. **Rank-local**, on rank 0.

    Each pass brings the newest state; those that were committed meanwhile are passed over. A pass that fails begins
    again, and finds what has arrived, until nothing has arrived for `patience` seconds.

    Args:
        remote: where to.
        folder: `<run>/checkpoints`.
        known_bytes: of the remote ledger, as it was found to belong to this run.
        patience: seconds.
    """

    def __init__(self, remote: Remote, folder: Path, *, known_bytes: int, patience: float = 300.0) -> None:
        self._remote = remote
        self._folder = folder
        self._own_bytes = {known_bytes}  # what our ledger may have there: an answer can be lost after the deed
        self._is_right_place = known_bytes > 0
        self._patience = patience
        self._lock = threading.Lock()
        self._newest = self._under_way = Committed()
        self._failure: OSError | None = None
        self._is_closing = threading.Event()
        self._job: Job | None = None
        self._uploader = Writer("keepbest-upload")

    def follow(self, committed: Committed) -> None:
        """Bring this state to the remote storage, soon. Before its snapshots may go, ask `held`."""
        with self._lock:
            self._newest = committed
        # A pass that has not begun will find it.
        if self._job is None or self._job.is_started:
            self._job = Job(self._bring, self._failed)
            self._uploader.submit(self._job)

    def held(self) -> frozenset[str]:
        """The snapshots that must stay in the folder, since they are being brought away, or will be."""
        with self._lock:
            return self._newest.snapshots | self._under_way.snapshots

    def take_failure(self) -> OSError | None:
        """Why the remote copy lags behind, if it does; told once."""
        with self._lock:
            failure, self._failure = self._failure, None
        return failure

    def arrive(self) -> None:
        """Wait until the newest state has arrived.

        Raises:
            OSError: if it cannot.
        """
        self._uploader.drain()
        if (failure := self.take_failure()) is not None:
            raise failure

    def close(self) -> None:
        """Wait for what is under way, though not much longer if it fails, and end the thread."""
        self._is_closing.set()
        self._uploader.close()
        if (failure := self.take_failure()) is not None:
            _logger.warning("%s", failure)

    def _failed(self, error: Exception) -> None:
        told = OSError(
            f"{self._remote.url} lags behind {self._folder}, where everything is complete: {error!r}. Each later save "
            f"tries again, and so does: python -m keepbest upload {self._folder.parent} {self._remote.url}"
        )
        told.__cause__ = error
        with self._lock:
            self._failure = told

    def _bring(self) -> None:
        with self._lock:
            committed = self._under_way = self._newest
        try:
            self._bring_with_patience(committed)
        finally:
            with self._lock:
                self._under_way = Committed()
        with self._lock:
            self._failure = None

    def _bring_with_patience(self, committed: Committed) -> None:
        progress, delay = _Progress(), 0.5
        while True:
            try:
                self._pass(committed, progress)
                return
            except LedgerError:
                raise
            except Exception as error:
                is_final = isinstance(error, _WRONG_PLACE) and not self._is_right_place
                delay = min(2 * delay, 30.0)
                patience = min(self._patience, _LAST_PATIENCE) if self._is_closing.is_set() else self._patience
                if is_final or time.monotonic() + delay > progress.last + patience:
                    raise
                _logger.warning("%s: %r; trying again in %g s", self._remote.url, error, delay)
            if self._is_closing.is_set():
                time.sleep(delay)
            else:
                self._is_closing.wait(delay)

    def _pass(self, committed: Committed, progress: _Progress) -> None:
        found = self._found()
        # What lies there without a ledger was left by nobody knows whom.
        arrived = found if LEDGER in found else {}
        wanted = self._files(committed.snapshots)
        for path, size in wanted.items():
            if arrived.get(path) != size:
                self._remote.put(self._folder / path, path)
                self._is_right_place = True
                progress.made()
        # Clients try again by themselves, and do not tell: a storage may have lost its memory since.
        found = self._found()
        if missing := [path for path, size in wanted.items() if found.get(path) != size]:
            raise ConnectionError(f"{missing[0]} was brought there, and is not there")
        with (self._folder / LEDGER).open("rb") as file:
            ledger = file.read(committed.ledger_bytes)
        self._own_bytes.add(len(ledger))
        self._remote.write_ledger(ledger)
        self._is_right_place = True
        kept = tuple(f"{SNAPSHOTS}/{name}/" for name in committed.snapshots)
        if garbage := [path for path in found if path != LEDGER and not path.startswith(kept)]:
            self._remote.remove(garbage)

    def _found(self) -> dict[str, int]:
        found = self._remote.sizes()
        if LEDGER in found and found[LEDGER] not in self._own_bytes:
            raise LedgerError(f"the ledger there, of {found[LEDGER]} bytes, is none of ours: another run goes there")
        return found

    def _files(self, snapshots: Collection[str]) -> dict[str, int]:
        """The bytes of every file of `snapshots`, by its path below `checkpoints`."""
        folders = (self._folder / SNAPSHOTS / name for name in sorted(snapshots))
        paths = (path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file())
        return {path.relative_to(self._folder).as_posix(): path.stat().st_size for path in paths}


class _Progress:
    """When something last got ahead, in seconds of the monotonic clock."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def made(self) -> None:
        self.last = time.monotonic()

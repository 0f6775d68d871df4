"""Brings what is committed in a run folder to a remote storage, on a thread of its own.

What a ledger names has arrived before the ledger does; what it does not name any more is removed after. So whenever the
run is cut off, the remote ledger records an earlier state of the run, and all of it is there.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from queue import Empty, SimpleQueue

from keepbest.errors import KeepBestError, LedgerError, SnapshotError
from keepbest.remote.storage import Remote, snapshot_in
from keepbest.run.digest import Digest, check_file, digest_file
from keepbest.run.follower import Committed, Note
from keepbest.run.layout import LEDGER, MANIFEST, SNAPSHOTS
from keepbest.run.reader import read_manifest
from keepbest.user_code import Log
from keepbest.worker import Threaded

_logger = Log(__name__)
_PATIENCE_AT_THE_END = 10.0
# Waiting does not help here, as long as nothing has ever arrived: a bucket that is missing, or is somebody else's.
_WRONG_PLACE = (FileNotFoundError, PermissionError)


class Mirror:
    """Follows the commits of a run folder with a remote copy. **Rank-local**, on rank 0.

    Each pass brings the newest state; those that were committed meanwhile are passed over. A pass that fails begins
    again, and finds what has arrived, until it has failed for `patience` seconds without getting ahead.

    Args:
        remote: Where to.
        folder: `<run>/checkpoints`.
        arrived: Paths of what is there, where there is a ledger of this run.
        note: Function that learns what is being brought there.
        clock: Function that gives seconds.
        patience: Seconds.

    Raises:
        ConfigError: If no thread can be started.
    """

    def __init__(
        self,
        remote: Remote,
        folder: Path,
        *,
        arrived: frozenset[str],
        note: Note,
        clock: Callable[[], float],
        patience: float,
    ) -> None:
        self._remote = remote
        self._folder = folder
        self._arrived = set(arrived)
        self._note = note
        self._is_right_place = bool(arrived)
        self._clock = clock
        self._patience = patience
        self._lock = threading.RLock()  # a handler of a signal may flush at any line, and so come here again
        self._newest = self._under_way = Committed()
        self._failure: OSError | None = None
        self._reported = ""  # what `arrive` raised
        # Whoever closes may be interrupted, which can leave the lock of an event taken, but not that of a queue of C.
        self._is_closing = self._is_over = False
        self._wakes: SimpleQueue[None] = SimpleQueue()  # ends the delay before the next try
        self._is_queued = False
        self._uploader = Threaded("keepbest-upload")

    def follow(self, committed: Committed) -> None:
        """Bring this state to the remote storage, soon. Before its snapshots may go, ask `held`."""
        with self._lock:
            self._newest = committed
            # A pass that has not begun will find it.
            is_queued, self._is_queued = self._is_queued, True
        if not is_queued:
            self._uploader.submit(self._bring, self._failed)

    def held(self) -> set[str]:
        """The snapshots that must stay in the folder, since they are being brought away, or will be."""
        # Without the lock: a handler of a signal may flush here, and wait for a thread that follows. The newest comes
        # first, since it is what comes under way.
        newest = self._newest.kept
        return {*newest, *self._under_way.kept}

    @property
    def failure(self) -> OSError | None:
        """Why the remote copy lags behind, if it does."""
        return self._failure

    def arrive(self) -> None:
        """Wait until the newest state has arrived.

        Raises:
            OSError: If it cannot.
        """
        self._uploader.drain()
        if (failure := self.failure) is not None:
            self._reported = str(failure)
            raise failure

    def close(self) -> None:
        """Wait for what is under way, but not for long, and end. A second call does nothing.

        A warning says what did not arrive, unless `arrive` has raised the same.
        """
        self._is_closing = True
        self._wakes.put(None)
        try:
            has_ended = self._uploader.close(timeout=_PATIENCE_AT_THE_END)
        finally:
            self._is_over = True
            self._wakes.put(None)
        if (failure := self.failure) is not None:
            if str(failure) != self._reported:
                _logger.warning("%s", failure)
        elif not has_ended:
            _logger.warning("%s lags behind %s: an upload was broken off", self._remote.url, self._folder)

    def _failed(self, error: BaseException) -> None:
        failure = OSError(
            f"{self._remote.url} lags behind {self._folder}, where everything is complete: {error!r}. Each later save "
            f"tries again, and so does: python -m keepbest upload {self._folder.parent} {self._remote.url}"
        )
        failure.__cause__ = error
        with self._lock:
            self._failure = failure

    def _bring(self) -> None:
        with self._lock:
            committed = self._under_way = self._newest
            self._is_queued = False
        there = {snapshot_in(path) for path in self._arrived}
        self._note(self._remote.url, sorted(committed.kept.keys() - there))
        try:
            self._bring_with_patience(committed)
            self._note(self._remote.url, [])
        finally:
            with self._lock:
                self._under_way = Committed()
        with self._lock:
            self._failure = None

    def _bring_with_patience(self, committed: Committed) -> None:
        brought: set[str] = set()
        got_ahead, failing_since, delay = 0, 0.0, 0.5
        while True:
            try:
                self._pass(committed, brought)
                return
            except KeepBestError:
                raise
            except Exception as error:
                if delay == 0.5 or len(brought) > got_ahead:
                    got_ahead, failing_since, delay = len(brought), self._clock(), 0.5
                delay = min(2 * delay, 30.0)
                patience = min(self._patience, _PATIENCE_AT_THE_END) if self._is_closing else self._patience
                is_final = isinstance(error, _WRONG_PLACE) and not self._is_right_place
                if is_final or self._is_over or self._clock() + delay > failing_since + patience:
                    raise
                _logger.warning("%s: %r; trying again in %g s", self._remote.url, error, delay)
            with contextlib.suppress(Empty):  # a run that ends does not wait out a delay
                self._wakes.get(timeout=delay)

    def _pass(self, committed: Committed, brought: set[str]) -> None:
        with (self._folder / LEDGER).open("rb") as file:
            ledger = file.read(committed.ledger_bytes)
        found = self._remote.sizes()
        # What this run has put there is a beginning of what it has now.
        if LEDGER in found:
            self._refuse_ledger_of_another(ledger)
        wanted = dict(self._files(committed, found))
        for path, digest in wanted.items():
            if path not in self._arrived or found.get(path) != digest.bytes:
                self._put(path, digest)
                brought.add(path)
        # Clients try again by themselves and do not report it: a storage may have lost its memory since.
        found = self._remote.sizes()
        if missing := [path for path, digest in wanted.items() if found.get(path) != digest.bytes]:
            raise ConnectionError(f"{missing[0]} was brought there, and is not there")
        self._refuse_if_over()
        if LEDGER in found:
            self._remote.write_ledger(ledger)
        elif not self._remote.write_first_ledger(ledger):
            self._refuse_ledger_of_another(ledger)
            self._remote.write_ledger(ledger)
        self._is_right_place = True
        others = {snapshot_in(path) for path in found} - committed.kept.keys() - {None}
        unneeded = {name for name in others if name in committed.known or self._is_of(committed.run_id, name)}
        self._remove([path for path in found if snapshot_in(path) in unneeded])

    def _refuse_ledger_of_another(self, ledger: bytes) -> None:
        if not ledger.startswith(there := self._remote.read_ledger()):
            raise LedgerError(f"the ledger there, of {len(there)} bytes, is none of ours: another run goes there")

    def _put(self, path: str, digest: Digest) -> None:
        self._refuse_if_over()
        check_file(self._folder / path, digest)  # what is damaged here must not take the place of what is there
        self._remote.put(self._folder / path, path)
        self._arrived.add(path)
        self._is_right_place = True

    def _is_of(self, run_id: str | None, snapshot: str | None) -> bool:
        """Whether a snapshot there is of this run: one that was brought there, and its commit lost with a machine."""
        try:
            manifest = json.loads(self._remote.read(f"{SNAPSHOTS}/{snapshot}/{MANIFEST}") or b"{}")
        except ValueError:
            return False
        return isinstance(manifest, dict) and manifest.get("run") == run_id

    def _remove(self, garbage: list[str]) -> None:
        try:
            for path in garbage:
                self._refuse_if_over()
                self._remote.remove(path)
            self._remote.remove_empty_folders()
        except Exception as error:  # noqa: BLE001  # the copy is complete, and the next pass tries again
            _logger.warning("%s: what is no longer needed stays until the next save: %r", self._remote.url, error)

    def _refuse_if_over(self) -> None:
        # The folder may have another owner by now, whose newer ledger must stay.
        if self._is_over:
            raise OSError("the run was left before all was brought there")

    def _files(self, committed: Committed, found: Mapping[str, int]) -> Iterator[tuple[str, Digest]]:
        """Path below `checkpoints` and digest of every file that `committed` needs, by its ledger and its manifests.

        Raises:
            SnapshotError: If a snapshot is damaged; one that is missing in the folder may be there.
        """
        for name, digest in sorted(committed.kept.items()):
            prefix, folder = f"{SNAPSHOTS}/{name}/", self._folder / SNAPSHOTS / name
            if not folder.exists() and f"{prefix}{MANIFEST}" in found:
                continue
            manifest = read_manifest(folder, digest)
            yield f"{prefix}{MANIFEST}", digest_file(folder / MANIFEST)
            for file, record in manifest.files.items():
                if not (folder / file).is_file():
                    raise SnapshotError(f"{folder / file} is missing")
                yield f"{prefix}{file}", record.digest

"""A run folder as this process has it open: what the keepers in it share."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from keepbest.errors import ConfigError
from keepbest.iteration import TrainingIteration
from keepbest.remote.copy import FollowingCopy
from keepbest.remote.storage import local_path
from keepbest.run.files import Files
from keepbest.run.folder import RunFolder
from keepbest.run.lock import RunLock
from keepbest.saving.job import PendingSnapshot
from keepbest.user_code import Log
from keepbest.worker import Inline, Threaded, Worker

_logger = Log(__name__)
Clock = Callable[[], float]
RESUME_SAVER = "resume"
"""Name of what saves resume checkpoints, among those of the keepers of a run."""


class WorksInRun:
    """Base of what works in a run folder that its process has open. A copy could neither share that nor have its own.

    Raises:
        TypeError: As objects of Python that cannot be copied do, if it is copied or pickled, with what holds it.
    """

    _run: OpenRun

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"cannot copy or pickle {type(self).__name__}, since it has a run folder open: hold it outside of what is "
            "copied or sent to other processes, such as a model or a dataset, and hand its state_dict() on"
        )


class OpenRun:
    """The same object for every keeper of this process in one run folder.

    All ranks have one, since all must know when a snapshot can be shared. That of rank 0 also has the folder.

    It belongs to the process in which the first keeper joined. A child that was forked from it has a copy, which
    changes nothing and releases nothing. A keeper that is garbage has left: a thread releases what it was the last to
    use, since a finalizer runs on any thread, at any moment, and must not wait. When the interpreter exits, what is
    still open is released as by `leave`, after what was registered with `atexit` since keepbest was imported.

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
        worker: Worker that writes into the folder.
        turn: Lock that is held during the calls of what works here, so that threads take turns.
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
        self._keepers: dict[str, weakref.finalize[..., Any]] = {}
        self._process: int | None = None
        self._is_over = False  # since the interpreter exits
        self.turn, self._lock = threading.RLock(), threading.RLock()
        self._newest: tuple[TrainingIteration, Hashable, PendingSnapshot, str] | None = None
        self._hurry: list[Callable[[], None]] = []
        self._at_release: dict[str, Callable[[], None]] = {}

    def share(self) -> OpenRun:
        """The one that everybody in this directory shares: this one, unless somebody holds another. **Rank-local**."""
        path = self.directory.resolve()
        run = _open_runs.setdefault(path, self)
        if run.is_elsewhere:
            run = _open_runs[path] = self
        return run

    @property
    def is_elsewhere(self) -> bool:
        """Whether this is a copy in a process that was forked from the one that works in the run."""
        return self._process is not None and self._process != os.getpid()

    def refuse_elsewhere(self) -> None:
        """Raise `ConfigError` in a process that was forked from the one that works in the run, or has released it."""
        if self._is_over:
            raise ConfigError(
                f"the interpreter exits, and has released {self.directory} as it was: use and close keepers before, or "
                "in a function that is given to atexit after keepbest was imported"
            )
        if self.is_elsewhere:
            raise ConfigError(
                f"process {os.getpid()} was forked from process {self._process}, whose keepers work in "
                f"{self.directory}: a forked process cannot use them. keepbest.load reads in any process what they keep"
            )

    def open_folder(self) -> RunFolder:
        """The folder, opened if need be, when nothing is being written into it. **Rank-local**, on rank 0.

        Raises as `RunFolder.claim`.
        """
        self.worker.drain()
        if self.folder is None:
            copy = None if self.remote is None else FollowingCopy(self.remote, self._clock, self._patience)
            lock = partial(RunLock, patience=self._lock_patience, clock=self._clock)
            self.folder = RunFolder(self.directory, self.files, copy, lock=lock)
        self.folder.claim()
        return self.folder

    def write_in_the_background(self, hurry: Callable[[], None]) -> None:
        """From now on, do the writing on a thread. **Rank-local**, on each rank that writes.

        Args:
            hurry: Function that is called before the thread is waited for, since nobody trains any more. It keeps no
                keeper alive.
        """
        self._hurry.append(hurry)
        if isinstance(self.worker, Inline):
            self.worker = Threaded("keepbest-writer")

    def at_release(self, name: str, step: Callable[[], None]) -> None:
        """Take one more step when everything is written and the folder is about to be released. **Rank-local**.

        Args:
            name: Name of the keeper whose step it is; each has one.
            step: Function that may be called again if it is interrupted. It keeps no keeper alive.
        """
        self._at_release[name] = step

    def join(self, name: str, remote: str | None, keeper: object) -> None:
        """Let `keeper`, which wants a copy of the run at `remote`, work here. **Rank-local**, on every rank.

        Raises:
            ConfigError: If there is one of this name already, or one that wants the copy elsewhere, or this is a
                forked process.
        """
        self.refuse_elsewhere()
        if self._keeper_named(name) is keeper:
            return  # it was interrupted before it had left
        with self._lock:
            if name in self._keepers:
                gc.collect()  # what is held by nothing but a cycle may look like a second keeper
            self._release_if_left()
            if name in self._keepers:
                raise ConfigError(
                    f"{_what_is_there_twice(name)}. If the other one is left from code that was interrupted, such as a "
                    f"cell of a notebook, release it and start again: keepbest.abandon({str(self.directory)!r})"
                )
            if self._keepers and remote != self.remote:
                raise ConfigError(
                    f"{name} has remote={remote!r}, and other keepers in {self.directory} have {self.remote!r}: a run "
                    "has one remote copy, so give all of its keepers the same"
                )
            if self._process is None:
                self._process = os.getpid()
                _unreleased.add(self)
            self.remote = remote
            self._keepers[name] = weakref.finalize(keeper, self._drop, name)
            self._keepers[name].atexit = False

    def join_beside_keepers(self, saver: object) -> None:
        """Let `saver` work here, with the remote copy that the keepers want. **Rank-local**. Raises as `join`."""
        self.join(RESUME_SAVER, self.remote if self._keepers else None, saver)

    def leave(self, name: str, keeper: object) -> None:
        """Let `keeper` go; the last one waits for the worker and releases the folder. **Rank-local**, on every rank.

        Nothing happens if it has not joined. An interruption leaves the waiting to a thread.
        """
        if self.is_elsewhere or self._keeper_named(name) is not keeper:
            return
        try:
            self._keepers.pop(name).detach()
            self._release_if_left()
        except BaseException:
            self._release_soon()
            raise

    def keepers(self) -> list[Any]:
        """The keepers that work here. **Rank-local**."""
        return [keeper for name in list(self._keepers) if (keeper := self._keeper_named(name)) is not None]

    def _keeper_named(self, name: str) -> Any:
        held = self._keepers[name].peek() if name in self._keepers else None
        return None if held is None else held[0]

    def _drop(self, name: str) -> None:
        if not self.is_elsewhere:
            self._keepers.pop(name, None)
            self._release_soon()

    def _release_soon(self) -> None:
        # Without a thread, the next keeper that joins does it, or the exit of the interpreter.
        with contextlib.suppress(RuntimeError):
            threading.Thread(target=self._release_if_left, name="keepbest-release", daemon=True).start()

    def leave_at_exit(self) -> None:
        """Let all keepers go, since the interpreter exits. **Rank-local**.

        The first interruption is a warning, since what is queued would be lost. The second one loses it.
        """
        if self.is_elsewhere:
            return
        self._is_over = True
        while self._keepers:
            self._keepers.popitem()[1].detach()
        try:
            self._release_if_left()
        except (KeyboardInterrupt, SystemExit):  # the second is what handlers of SIGTERM raise
            _logger.warning(
                "%s: the process waits until what was saved in the background is written; another interruption loses "
                "what is not",
                self.directory,
            )
            self._release_if_left()

    def _release_if_left(self) -> None:
        """Release the folder, once what is queued is written, if no keeper works here any more."""
        with self._lock:
            if self._keepers or self._process is None:
                return
            # Each step may be taken again, if an interruption comes before the last one.
            self._newest = None
            for hurry in self._hurry:
                hurry()  # a keeper that is garbage, or open when the interpreter exits, did not do it
            self.worker.close()
            for step in self._at_release.values():
                step()
            self._hurry.clear()
            self._at_release.clear()
            self.worker = Inline()
            if self.folder is not None:
                self.folder.close()
            self.folder = None
            self._process = None
            _unreleased.discard(self)

    @property
    def has_several_keepers(self) -> bool:
        """Whether several keepers work here, on every rank alike."""
        return len(self._keepers.keys() - {RESUME_SAVER}) > 1

    def remember(self, iteration: TrainingIteration, content: Hashable, snapshot: PendingSnapshot, mark: str) -> None:
        """Note which snapshot holds `content` as it was at `iteration`, and the mark of this rank's weights then."""
        self._newest = (iteration, content, snapshot, mark)

    def snapshot_with(self, iteration: TrainingIteration, content: Hashable) -> tuple[PendingSnapshot, str] | None:
        """The snapshot that was just taken of the same content at the same iteration, if there is one, and the mark."""
        if self._newest is not None and self._newest[:2] == (iteration, content):
            return self._newest[2:]
        return None


def _what_is_there_twice(name: str) -> str:
    if name == RESUME_SAVER:
        return "another trainer of this process saves resume checkpoints in this run; give each a directory of its own"
    return f"two keepers of this run are named {name!r}; give one of them an id"


# One folder, lock and ledger for a directory in a process, for as long as a keeper holds it.
_open_runs: weakref.WeakValueDictionary[Path, OpenRun] = weakref.WeakValueDictionary()
_unreleased: set[OpenRun] = set()  # also where no keeper is left, until what is queued is written


@atexit.register  # here, since what is registered later is called earlier, and may still use a keeper
def _leave_all() -> None:
    for run in list(_unreleased):
        run.leave_at_exit()


def abandon(directory: str | Path) -> None:
    """Abandon all keepers that this process has started in `directory`, and not closed. **Rank-local**.

    That is for a notebook, in which a cell that was interrupted may have left a keeper that no variable names any more.
    Each of them leaves the run as it is, to be resumed. Where there are none, nothing happens.

    Raises:
        ConfigError: If `directory` is a URL.
    """
    run = _open_runs.get(local_path(directory, "directory").resolve())
    for keeper in [] if run is None else run.keepers():
        keeper.abandon()

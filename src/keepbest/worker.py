"""Does work in the order in which it was submitted: at once, or on a thread. It never runs a collective."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import NamedTuple, Protocol

from keepbest.errors import ConfigError


class _Job(NamedTuple):
    work: Callable[[], None]
    failed: Callable[[BaseException], None]


class Worker(Protocol):
    """Does work that is submitted to it. **Rank-local**."""

    def submit(self, work: Callable[[], None], failed: Callable[[BaseException], None]) -> None:
        """Have `work` done after everything that was submitted before; `failed` gets the error if it could not be."""

    def drain(self) -> None:
        """Wait until everything that was submitted before is done, or has failed."""

    def close(self, timeout: float | None = None) -> bool:
        """Drain and end; returns whether it has ended within `timeout` seconds. A second call does nothing.

        Work that calls it does not wait for itself, nor does a forked child, which has no such thread.
        """


class Inline:
    """Does everything at once, on the thread that submits it."""

    def submit(self, work: Callable[[], None], failed: Callable[[BaseException], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001  # raised again on every rank, at the next exchange
            failed(error)

    def drain(self) -> None:
        """Nothing is ever left to do."""

    def close(self, timeout: float | None = None) -> bool:
        del timeout
        return True


class Threaded:
    """Works on a thread of its own, until it is closed.

    A thread that waits here may be interrupted at any moment. So both sides share nothing but a queue and a lock of C.
    An interruption can leave the lock of a condition taken, which would stop the thread for good.

    Args:
        name: Name of the thread.

    Raises:
        ConfigError: If no thread can be started.
    """

    def __init__(self, name: str) -> None:
        self._process = os.getpid()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()  # `None` ends it
        self._is_closing = self._is_over = False
        self._alive = threading.Lock()  # held while the thread works
        self._alive.acquire()
        # A daemon, since the interpreter joins other threads before it would ask this one to end.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise ConfigError(
                f"the thread {name} cannot be started ({error}): raise the number of threads that this process may "
                "have (ulimit -u, or the limit of its container), or train with async_save=False and without remote"
            ) from error
        except BaseException:  # an interruption, while the thread comes to life
            self._jobs.put(None)
            raise

    def submit(self, work: Callable[[], None], failed: Callable[[BaseException], None]) -> None:
        self._jobs.put(_Job(work, failed))

    def drain(self) -> None:
        if self._is_over or threading.current_thread() is self._thread or os.getpid() != self._process:
            return  # what was submitted before this job is done
        if self._is_closing:
            self.close()
            return
        done = threading.Lock()
        done.acquire()
        self._jobs.put(_Job(done.release, lambda _: None))
        done.acquire()

    def close(self, timeout: float | None = None) -> bool:
        self._is_closing = True
        self._jobs.put(None)  # also the second time, since an interruption may have come before the first one
        if threading.current_thread() is self._thread or os.getpid() != self._process:
            return False
        if not self._is_over:
            if not self._alive.acquire(timeout=-1 if timeout is None else timeout):
                return False
            self._alive.release()
        self._thread.join()
        return True

    def end_before_exit(self, stop: Callable[[], None]) -> None:
        """Let the interpreter call `stop`, and then wait for this thread, before it exits, unless it has ended."""
        # It is alive while it runs, and needs no wait when it is garbage. Nothing here may refer to it.
        weakref.finalize(self._thread, _end, self._process, stop, self._jobs, self._alive)

    def _run(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                try:
                    job.work()
                except BaseException as error:  # noqa: BLE001  # raised again on every rank, at the next exchange
                    job.failed(error)
                finally:
                    del job  # it may name the keeper, which must not outlive its last user here
        finally:  # also where `failed` raises, as a handler of the log may: nobody must wait for this thread for good
            self._is_over = True
            self._alive.release()


def _end(process: int, stop: Callable[[], None], jobs: SimpleQueue[_Job | None], alive: threading.Lock) -> None:
    if process == os.getpid():
        stop()
        jobs.put(None)
        with alive:
            return

"""A thread that does the writing of a run, in the order in which it was asked for. It never runs a collective."""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import Callable


class Job:
    """Something to be written.

    Attributes:
        work: does it.
        failed: is told, on the writer's thread, why it could not be done.
        is_started: whether the writer has come to it.
    """

    def __init__(self, work: Callable[[], None], failed: Callable[[Exception], None]) -> None:
        self.work = work
        self.failed = failed
        self.is_started = False


class Writer:
    """Does jobs one after the other on a thread of its own, until it is closed or the interpreter exits.

    The interpreter waits for what is queued when it exits in order, also after an exception in the main thread.
    """

    def __init__(self, name: str) -> None:
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        # A daemon, since the interpreter joins other threads before it would tell this one to end.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def submit(self, job: Job) -> None:
        """Queue a job."""
        with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()

    def replace(self, job: Job, work: Callable[[], None]) -> bool:
        """Let `job` do other `work`, if the writer has not come to it. Returns whether it will."""
        with self._changed:
            if job.is_started:
                return False
            job.work = work
            return True

    def drain(self) -> None:
        """Wait until everything that was queued is done, or was told to have failed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs)

    def close(self, timeout: float | None = None) -> bool:
        """Drain, and end the thread. A second call does nothing.

        Args:
            timeout: seconds after which the thread is left to itself.

        Returns:
            Whether it has ended.
        """
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
        atexit.unregister(self.close)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._is_closing)
                if not self._jobs:
                    return
                job = self._jobs[0]
                job.is_started = True
            try:
                job.work()
            except Exception as error:  # noqa: BLE001  # raised again on every rank, at the next exchange
                job.failed(error)
            with self._changed:
                self._jobs.popleft()
                self._changed.notify_all()

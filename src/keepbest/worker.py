"""Does work in the order in which it was submitted: at once, or on a thread. It never runs a collective."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

from keepbest.errors import ConfigError


class _Job(NamedTuple):
    work: Callable[[], None]
    failed: Callable[[BaseException], None]


class Worker(Protocol):
    """Somebody who does work. **Rank-local**."""

    def submit(self, work: Callable[[], None], failed: Callable[[BaseException], None]) -> None:
        """Have `work` done after everything that was submitted before; `failed` gets the error if it could not be."""

    def drain(self) -> None:
        """Wait until everything that was submitted before is done, or has failed."""

    def close(self, timeout: float | None = None) -> bool:
        """Drain and end; returns whether it has ended within `timeout` seconds. A second call does nothing."""


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

    Args:
        name: Name of the thread.

    Raises:
        ConfigError: If no thread can be started.
    """

    def __init__(self, name: str) -> None:
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._is_closing = self._is_over = False
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
            with self._changed:
                self._is_closing = True
                self._changed.notify_all()
            raise

    def submit(self, work: Callable[[], None], failed: Callable[[BaseException], None]) -> None:
        with self._changed:
            self._jobs.append(_Job(work, failed))
            self._changed.notify_all()

    def drain(self) -> None:
        if threading.current_thread() is self._thread:
            return  # what was submitted before this job is done
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs)

    def close(self, timeout: float | None = None) -> bool:
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
            # After an interrupted join() of a thread that works, Python takes it for one that has ended.
            has_ended = self._changed.wait_for(lambda: self._is_over, timeout)
        if has_ended:
            self._thread.join()
        return has_ended

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._is_closing)
                if not self._jobs:
                    self._is_over = True
                    self._changed.notify_all()
                    return
                job = self._jobs[0]
            try:
                job.work()
            except BaseException as error:  # noqa: BLE001  # raised again on every rank, at the next exchange
                job.failed(error)
            finally:
                del job  # it may name the keeper, which must not outlive its last user here
                with self._changed:
                    self._jobs.popleft()
                    self._changed.notify_all()

"""Signals that ask training to stop, heard by all ranks at the same update.

    with Preemption(ranks) as preemption:
        while ...:
            ...                              # one update
            if preemption.is_agreed():
                preemption.stop("E3_U120")   # after everything that is needed to go on was made durable

SLURM warns a job before its time limit (`--signal`), cloud machines before they are taken away, torchrun when it ends.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn

from keepbest.errors import PreemptedError
from keepbest.ranks import Ranks

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Preemption:
    """Catches SIGTERM, SIGUSR1 and SIGINT in a `with` block. A second SIGINT interrupts at once.

    Outside of the main thread, where Python hears no signals, it hears those of the other ranks.

    Args:
        ranks: who stop together.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._flag = ranks.flag()
        self._handlers: dict[int, Any] = {}

    def is_agreed(self) -> bool:
        """Whether all ranks stop now, since one of them was asked to before the last call. **Collective**.

        Does not wait: the question travels while the next update runs.

        Raises:
            RanksError: as any exchange of the ranks.
        """
        return self._flag.poll()

    def stop(self, iteration: object) -> NoReturn:
        """End training. **Rank-local**, on every rank.

        Raises:
            PreemptedError: always.
        """
        raise PreemptedError(
            f"training was asked to stop by a signal, and did at {iteration}: what was observed and saved is durable. "
            "Start it again, with trainer.resume=auto, to go on"
        )

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._hear) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number in self._handlers:
            self._put_back(number)

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        self._flag.raise_it()
        if number == signal.SIGINT:
            self._put_back(number)

    def _put_back(self, number: int) -> None:
        # Python does not know a handler that was not installed from Python, and cannot put it back.
        handler = self._handlers[number]
        signal.signal(number, signal.SIG_DFL if handler is None else handler)

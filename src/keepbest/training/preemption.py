"""Signals that ask training to stop, and the agreement to stop after the same update on all ranks.

    with Preemption(ranks) as preemption:
        while ...:
            ...                              # one update
            if preemption.is_agreed():
                preemption.stop("E3_U120")   # after everything that a resumed run needs was made durable

SLURM warns a job before its time limit (`--signal`), clouds warn before they reclaim a machine, torchrun when it ends.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn

from keepbest.errors import PreemptedError
from keepbest.ranks import Ranks

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Preemption:
    """Catches SIGTERM, SIGUSR1 and SIGINT in a `with` block. A second SIGINT interrupts at once.

    Outside of the main thread Python receives no signals. There it only learns of the signals of the other ranks. A
    child that is forked in the block is no rank. It ends by SIGTERM, as without the block. SIGUSR1 and the first SIGINT
    leave it alone: a terminal and SLURM send them to all processes, and training still needs those that load its data.

    Args:
        ranks: Ranks that stop together.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._flag = ranks.flag()
        self._handlers: dict[int, Any] = {}
        self._process = 0

    def is_agreed(self) -> bool:
        """Whether all ranks stop now, because one of them was asked to before the last call. **Collective**.

        It does not wait: the question travels while the next update runs.

        Raises:
            RanksError: If a rank is gone, does not arrive in time, or may run no more collectives.
        """
        return self._flag.poll()

    def stop(self, iteration: object) -> NoReturn:
        """End training. **Rank-local**, but every rank must call it.

        Args:
            iteration: Last completed iteration.

        Raises:
            PreemptedError: Always.
        """
        raise PreemptedError(
            f"training was asked to stop by a signal, and did at {iteration}: what was observed and saved is durable. "
            "Start it again, with trainer.resume=auto, to continue"
        )

    def __enter__(self) -> Preemption:
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number in self._handlers:
            self._restore_handler(number)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() == self._process:
            self._flag.raise_it()
        elif number == signal.SIGTERM:  # whoever ends such a child, as Python does when it exits, waits for its end
            self._restore_handler(number)
            signal.raise_signal(number)
        if number == signal.SIGINT:
            self._restore_handler(number)

    def _restore_handler(self, number: int) -> None:
        # Python does not know a handler that was not installed from Python, and cannot restore it.
        handler = self._handlers[number]
        signal.signal(number, signal.SIG_DFL if handler is None else handler)

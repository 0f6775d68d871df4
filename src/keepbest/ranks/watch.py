"""Says for whom this rank waits, when that takes long. It costs an exchange one assignment.

A thread looks every few seconds, since an exchange between two ranks cannot be waited for in parts: gloo closes the
connection when the time of a wait is up.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref

from keepbest.ranks.carrier import Carrier, InFlight

_logger = logging.getLogger(__name__)

_LONG = 10.0  # seconds of a wait that is worth a line
_LOOK = 2.0  # seconds between two looks


class Watch:
    """Watches the waits of one rank. **Rank-local**.

    Of the ranks that wait, the lowest one logs. It does so again when a wait has taken twice as long as the last one
    that it logged, so that ranks that are always late do not fill the log.

    Args:
        rank: Rank of this process.
        world_size: Number of ranks.
        carrier: What carries the exchanges, and knows which ranks have not come.

    Attributes:
        present: Exchange that is waited for; `None` if there is none.
    """

    def __init__(self, rank: int, world_size: int, carrier: Carrier) -> None:
        self.present: InFlight | None = None
        self._rank, self._world_size, self._carrier = rank, world_size, carrier
        self._long = _LONG

    def begin(self) -> None:
        """Start the thread. It ends with the last reference to this. Where it cannot be started, nothing is logged."""
        thread = threading.Thread(target=_look_again, args=(weakref.ref(self),), name="keepbest-watch", daemon=True)
        with contextlib.suppress(RuntimeError):  # a limit of threads; the waits themselves go without
            thread.start()

    def look(self) -> None:
        """Log for whom this rank waits, if it has done so for long."""
        flight = self.present
        if flight is None or time.monotonic() - flight.started < self._long:
            return
        absent = self._carrier.absent(flight)
        if self.present is not flight or not absent:  # they have come by now
            return
        waited = time.monotonic() - flight.started
        self._long = 2 * waited
        if self._rank == min(rank for rank in range(self._world_size) if rank not in absent):
            _logger.warning(
                "rank %d of %d has waited %.0f s in step '%s' for rank %s",
                self._rank,
                self._world_size,
                waited,
                flight.step,
                ", ".join(map(str, absent)),
            )


def _look_again(watched: weakref.ref[Watch]) -> None:
    while (watch := watched()) is not None:
        watch.look()
        del watch
        time.sleep(_LOOK)  # nothing reports that an exchange has not ended

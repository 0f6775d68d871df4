"""Two ranks send to each other, without a third one in between and without a pool of threads."""

from __future__ import annotations

import time
from datetime import timedelta

import torch.distributed as dist

from keepbest.ranks.carrier import InFlight

_FIRST_TAG = 2  # of a message of no bytes; the watch has 1
_MARGIN = 0.002  # seconds, since torch cuts a timeout to milliseconds, and 0 would be no limit


class Direct:
    """Carries an exchange between two ranks by a message each way.

    torch sends and receives on the thread that asks for it, while a collective of gloo goes through a pool of threads.
    Between two ranks that takes half of the time. Among more, who waits for the message of one rank would not notice
    that another one has died.

    Messages of each size have a tag of their own. After an interruption one rank may send a text while the other waits
    for a frame, and gloo ends a process that receives more than it has asked for.

    Args:
        gloo: Backend that connects the ranks. Nobody else sends messages in it.
        rank: Rank of this process.
    """

    def __init__(self, gloo: dist.ProcessGroupGloo, rank: int) -> None:
        self._send, self._recv = gloo.send, gloo.recv  # type: ignore[attr-defined]  # its stub lacks them
        self._rank, self._other = rank, 1 - rank
        # What is on its way keeps its memory, also where nobody waits for it any more: gloo closes a connection over
        # which bytes come for a receive that is gone.
        self._flights: list[InFlight] = []

    def start(self, flight: InFlight, timeout: timedelta) -> None:
        del timeout  # each wait has its own
        self._flights.append(flight)
        buffers, tag = flight.buffers, _tag(flight)
        buffers.keep_own(self._rank)
        try:  # the receive comes first, so that what arrives early has a place
            flight.works.append(self._recv([buffers.rows[self._other]], self._other, tag))
        finally:  # also where this is interrupted, since the other rank waits
            flight.works.append(self._send([buffers.row], self._other, tag))
        flight.is_under_way = True

    def wait(self, flight: InFlight, timeout: timedelta) -> None:
        end = flight.started + timeout.total_seconds() + _MARGIN
        for work in flight.works:
            work.wait(timedelta(seconds=max(end - time.monotonic(), _MARGIN)))
            flight.has_arrived = True
        # Messages of one tag arrive in their order.
        number, tag = flight.number, _tag(flight)
        self._flights = [other for other in self._flights if other.number > number or _tag(other) != tag]

    def absent(self, flight: InFlight) -> list[int]:
        return [] if flight.has_arrived else [self._other]


def _tag(flight: InFlight) -> int:
    return _FIRST_TAG + len(flight.buffers.sent)

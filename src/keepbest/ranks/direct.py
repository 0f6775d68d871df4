"""Two ranks send to each other, without a third one in between and without a pool of threads."""

from __future__ import annotations

import contextlib
import time
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from keepbest.ranks.buffers import Row
from keepbest.ranks.carrier import InFlight
from keepbest.ranks.frame import FRAME_BYTES

_FRAMES, _OTHERS = 0, 2  # tags of messages; the watch has 1
_MARGIN = 0.002  # seconds, since torch cuts a timeout to milliseconds, and 0 would be no limit


class _Asked(NamedTuple):
    """A message that this rank has asked for, and the memory that it comes to."""

    row: Row
    work: dist.Work


class Direct:
    """Carries an exchange between two ranks by a message each way.

    torch sends and receives on the thread that asks for it, while a collective of gloo goes through a pool of threads.
    Between two ranks that takes half of the time. Among more, who waits for the message of one rank would not notice
    that another one has died.

    gloo sends what the other rank has asked for, and sends nothing before. So each exchange of frames asks for the
    frame of the next one, which then needs no message back, and is there already for the rank that comes later.

    Args:
        gloo: Backend that connects the ranks. Nobody else sends messages in it.
        rank: Rank of this process.
    """

    def __init__(self, gloo: dist.ProcessGroupGloo, rank: int) -> None:
        self._send, self._recv = gloo.send, gloo.recv  # type: ignore[attr-defined]  # its stub lacks them
        self._rank, self._other = rank, 1 - rank
        self._next_frame: _Asked | None = None
        # What is on its way keeps its memory, also where nobody waits for it any more: gloo closes a connection over
        # which bytes come for a receive that is gone.
        self._flights: list[InFlight] = []

    def start(self, flight: InFlight, timeout: timedelta) -> None:
        del timeout  # each wait has its own
        self._flights.append(flight)
        buffers, tag = flight.buffers, _tag(flight)
        buffers.keep_own(self._rank)
        free = buffers.rows[self._other]
        try:  # the receive comes first, so that what arrives early has a place
            if tag == _FRAMES:
                asked, self._next_frame = self._next_frame or self._ask(Row(FRAME_BYTES), tag), None
                buffers.rows[self._other] = asked.row
            else:
                asked = self._ask(free, tag)
            flight.works.append(asked.work)
        finally:  # also where this is interrupted, since the other rank waits
            flight.works.append(self._send([buffers.sent.tensor], self._other, tag))
        if tag == _FRAMES:
            with contextlib.suppress(RuntimeError):  # the other rank may have left: this exchange is its last
                self._next_frame = self._ask(free, tag)
        flight.is_under_way = True

    def wait(self, flight: InFlight, timeout: timedelta) -> None:
        end = flight.started + timeout.total_seconds() + _MARGIN
        for work in flight.works:
            work.wait(timedelta(seconds=max(end - time.monotonic(), _MARGIN)))
            flight.has_arrived = True
        # Messages of one tag arrive in their order.
        tag, number = _tag(flight), flight.number
        self._flights = [other for other in self._flights if other.number > number or _tag(other) != tag]

    def absent(self, flight: InFlight) -> list[int]:
        return [] if flight.has_arrived else [self._other]

    def _ask(self, row: Row, tag: int) -> _Asked:
        return _Asked(row, self._recv([row.tensor], self._other, tag))


def _tag(flight: InFlight) -> int:
    return _FRAMES if flight.buffers.size == FRAME_BYTES else _OTHERS

"""Two ranks send to each other, without a third one in between and without a pool of threads."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from keepbest.ranks.buffers import Row
from keepbest.ranks.carrier import InFlight, has_lost, is_of_gloo
from keepbest.ranks.frame import FRAME_BYTES

_FIRST_TAG = 2  # of a message of no bytes; the watch has 1
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

    Messages of each size have a tag of their own. After an interruption one rank may send a text while the other waits
    for a frame, and gloo ends a process that receives more than it has asked for.

    Args:
        gloo: Backend that connects the ranks. Nobody else sends messages in it.
        rank: Rank of this process.
    """

    def __init__(self, gloo: dist.ProcessGroupGloo, rank: int) -> None:
        self._gloo = gloo
        self._send, self._recv = gloo.send, gloo.recv  # type: ignore[attr-defined]  # its stub lacks them
        self._rank, self._other = rank, 1 - rank
        # What is on its way keeps its memory, also where nobody waits for it any more: bytes that come for a receive
        # that is gone are lost, or end the connection.
        self._flights: list[InFlight] = []
        self._asked: dict[int, _Asked] = {}  # in advance, by the number of bytes
        self._end: RuntimeError | None = None  # why nothing can be asked for any more

    def start(self, flight: InFlight, timeout: timedelta) -> None:
        del timeout  # each wait has its own
        if self._end is not None:
            raise self._end
        self._flights.append(flight)
        buffers = flight.buffers
        buffers.keep_own(self._rank)
        row = buffers.rows[self._other]
        try:  # the receive comes first, so that what arrives early has a place
            asked = self._asked.pop(buffers.size, None) or self._ask(row)
            buffers.rows[self._other] = asked.row
            flight.works.append(asked.work)
        finally:  # also where this is interrupted, since the other rank waits
            flight.works.append(self._send([buffers.sent.tensor], self._other, _tag(buffers.size)))
        if buffers.size == FRAME_BYTES:
            self._ask_in_advance(Row(FRAME_BYTES) if asked.row is row else row)
        flight.is_under_way = True

    def wait(self, flight: InFlight, timeout: timedelta) -> None:
        end = flight.started + timeout.total_seconds() + _MARGIN
        for work in flight.works:
            work.wait(timedelta(seconds=max(end - time.monotonic(), _MARGIN)))
            flight.has_arrived = True
        # Messages of one tag arrive in their order.
        number, size = flight.number, flight.buffers.size
        self._flights = [other for other in self._flights if other.number > number or other.buffers.size != size]

    def absent(self, flight: InFlight) -> list[int]:
        return [] if flight.has_arrived else [self._other]

    def _ask(self, row: Row) -> _Asked:
        return _Asked(row, self._recv([row.tensor], self._other, _tag(len(row.data))))

    def _ask_in_advance(self, row: Row) -> None:
        try:
            self._asked[len(row.data)] = self._ask(row)
        except RuntimeError as error:
            # The other rank may have left, since this exchange may be its last one.
            if not is_of_gloo(error) or not has_lost(self._gloo, self._other):
                raise
            self._end = error.with_traceback(None)  # whose frames hold this object


def _tag(size: int) -> int:
    return _FIRST_TAG + size

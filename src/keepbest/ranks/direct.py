"""Each rank sends to each other rank: it takes one hop, and each rank knows who is late."""

from __future__ import annotations

import time
from datetime import timedelta

import torch.distributed as dist

from keepbest.ranks.carrier import InFlight

_TAG = 0
_MARGIN = 0.002  # seconds, since torch cuts a timeout to milliseconds
_AT_ONCE = timedelta(milliseconds=1)  # 0 would be no limit


class Direct:
    """Carries an exchange by a message between each two ranks.

    torch sends and receives on the thread that asks for it, while a collective of gloo goes through a pool of threads:
    between few ranks that takes half of the time. But each rank has a connection to each other one.

    Args:
        gloo: Backend that connects the ranks. Nobody else sends messages in it.
        rank: Rank of this process.
        world_size: Number of ranks.
    """

    def __init__(self, gloo: dist.ProcessGroupGloo, rank: int, world_size: int) -> None:
        # The stub of the class lacks them.
        self._send, self._recv = gloo.send, gloo.recv  # type: ignore[attr-defined]
        self._rank = rank
        # Each begins with the next one, so that not all send to rank 0 first.
        self._others = [(rank + distance) % world_size for distance in range(1, world_size)]
        # What is on its way keeps its memory, also where nobody waits for it any more.
        self._flights = set[InFlight]()

    def start(self, flight: InFlight, timeout: timedelta) -> None:
        del timeout  # each wait has its own
        self._flights.add(flight)
        buffers = flight.buffers
        buffers.keep_own(self._rank)
        for other in self._others:  # receives come first, so that what arrives early has a place
            flight.receiving.append((other, self._recv([buffers.rows[other]], other, _TAG)))
        for other in self._others:
            flight.sending.append(self._send([buffers.row], other, _TAG))

    def wait(self, flight: InFlight, timeout: timedelta) -> None:
        end = flight.started + timeout.total_seconds() + _MARGIN
        while flight.receiving:
            flight.receiving[-1][1].wait(_time_until(end))
            flight.receiving.pop()
        while flight.sending:
            flight.sending[-1].wait(_time_until(end))
            flight.sending.pop()
        self._flights.discard(flight)

    def absent(self, flight: InFlight) -> list[int]:
        return sorted(other for other, work in flight.receiving if not _has_arrived(work))


def _time_until(end: float) -> timedelta:
    return timedelta(seconds=max(end - time.monotonic(), _MARGIN))


def _has_arrived(work: dist.Work) -> bool:
    try:
        work.wait(_AT_ONCE)
    except RuntimeError:
        return False
    return True

"""Each rank passes to the next one what came from the rank before it."""

from __future__ import annotations

import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions  # type: ignore[attr-defined]  # not in its __all__

from keepbest.ranks.attendance import absent_ranks, sign_in
from keepbest.ranks.carrier import InFlight, is_of_gloo

_PATIENCE_BEFORE_SIGN_IN = timedelta(seconds=1)
_CUT = 0.001  # seconds, since torch cuts a timeout to milliseconds


class Ring:
    """Carries an exchange by an all_gather of gloo: one hop for each rank, over two connections of each.

    Args:
        group: Group of gloo.
        rank: Rank of this process in it.
    """

    def __init__(self, group: dist.ProcessGroup, rank: int) -> None:
        self._group = group
        self._rank = rank

    def start(self, flight: InFlight, timeout: timedelta) -> None:
        options = AllgatherOptions()
        options.timeout = timeout
        rows, sent = [row.tensor for row in flight.buffers.rows], flight.buffers.sent.tensor
        flight.works.append(self._group.allgather([rows], [sent], options))
        flight.is_under_way = True

    def wait(self, flight: InFlight, timeout: timedelta) -> None:
        [work] = flight.works
        if not _finished_within(work, min(timeout, _PATIENCE_BEFORE_SIGN_IN)):
            # Only ranks that have to wait sign in, so that a quiet interval does not use the store.
            sign_in(self._group, self._rank, flight.number)
            work.wait()

    def absent(self, flight: InFlight) -> list[int] | None:
        return absent_ranks(self._group, self._rank, flight.number)


def _finished_within(work: dist.Work, timeout: timedelta) -> bool:
    end = time.monotonic() + timeout.total_seconds() - _CUT
    try:
        work.wait(timeout)
    except RuntimeError as error:
        # Before the time is up it is a failure, or what a handler of a signal raised.
        if not is_of_gloo(error) or time.monotonic() < end:
            raise
        if not work.is_completed():
            return False
        work.wait()  # it has ended just now, and raises how if it failed
    return True

"""What carries the bytes of an exchange from each rank to all others."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from keepbest.ranks.buffers import Buffers

_WATCH_TAG = 1  # of messages that nobody sends; exchanges have larger ones


@dataclass(slots=True, eq=False)
class InFlight:
    """An exchange on its way.

    Attributes:
        buffers: Memory that it works on.
        number: Number of the exchange among those of the group.
        step: What the ranks do, in words.
        started: Moment of its start, in seconds of the monotonic clock.
        works: Handles from torch, in the order in which they are waited for.
        is_under_way: Whether this rank has done all for it but wait.
        has_arrived: Whether something is known to have arrived.
    """

    buffers: Buffers
    number: int
    step: str = ""
    started: float = field(default_factory=time.monotonic)
    works: list[dist.Work] = field(default_factory=list)
    is_under_way: bool = False
    has_arrived: bool = False


class Carrier(Protocol):
    """Carries the same number of bytes from each rank to all others."""

    def start(self, flight: InFlight, timeout: timedelta) -> None:
        """Send what this rank has in the buffers, and receive there. **Collective**.

        Raises:
            RuntimeError: If a rank is gone.
        """

    def wait(self, flight: InFlight, timeout: timedelta) -> None:
        """Wait until all bytes have arrived, and for `timeout` from the start at most. **Collective**.

        Raises:
            RuntimeError: If a rank is gone, or does not arrive in time.
        """

    def absent(self, flight: InFlight) -> Sequence[int] | None:
        """The ranks that have not arrived, after a wait that failed; `None` if that cannot be known. **Rank-local**."""


class Alone:
    """There is one rank, which receives what it sends."""

    def start(self, flight: InFlight, timeout: timedelta) -> None:
        del timeout
        flight.buffers.keep_own(0)

    def wait(self, flight: InFlight, timeout: timedelta) -> None:
        """There is nothing to wait for."""

    def absent(self, flight: InFlight) -> Sequence[int]:
        del flight
        return ()


def has_lost(gloo: dist.ProcessGroupGloo, rank: int) -> bool:
    """Whether the connection with `rank` is known to be broken. **Rank-local**, from any thread; waits for nothing.

    gloo watches its connections all the time, and says what it has seen when it is asked for something. A receive
    that has to wait would close a connection when its time is up; so this one is only asked for. Nobody sends it
    anything.
    """
    never = [torch.empty(1, dtype=torch.uint8, device="cpu")]
    try:
        gloo.recv(never, rank, _WATCH_TAG)  # type: ignore[attr-defined]  # its stub lacks it
    except RuntimeError as error:
        if not is_of_gloo(error):
            raise
        return True
    return False


def is_of_gloo(error: BaseException) -> bool:
    """Whether gloo may have raised it. A handler of a signal, and a mode of torch, have classes of their own."""
    return type(error) is RuntimeError or isinstance(error, dist.DistError)

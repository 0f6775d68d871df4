"""What carries the bytes of an exchange from each rank to all others."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from keepbest.ranks.buffers import Buffers


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


@contextlib.contextmanager
def unseen_by_the_profiler() -> Iterator[None]:
    """What begins in this block may end in another session of `torch.profiler`.

    The profiler would note the end in the record of the session in which it began, which torch has freed by then.
    """
    torch.autograd._enable_record_function(False)  # type: ignore[attr-defined]  # noqa: SLF001  # see docs/adr/0010
    try:
        yield
    finally:
        torch.autograd._enable_record_function(True)  # type: ignore[attr-defined]  # noqa: SLF001  # as above

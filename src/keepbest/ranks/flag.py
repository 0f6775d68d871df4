"""A flag that any rank may raise, and that all ranks see at the same moment, without waiting for each other."""

from __future__ import annotations

from datetime import timedelta

from keepbest.ranks.buffers import Buffers
from keepbest.ranks.carrier import InFlight
from keepbest.ranks.control_group import ControlGroup

_STEP = "ask whether a rank has raised its flag"


class SharedFlag:
    """A flag that travels while the ranks work: if it is raised before one `poll`, all ranks see it at the next.

    Args:
        control: Control group of the ranks.
        timeout: Time that a rank waits for one that does not poll.
    """

    def __init__(self, control: ControlGroup, timeout: timedelta) -> None:
        self._control = control
        self._timeout = timeout
        self._buffers = Buffers(1, control.world_size)
        self._in_flight: InFlight | None = None
        self._is_raised = False

    def raise_it(self) -> None:
        """Raise the flag. **Rank-local**. A signal handler may call it."""
        self._is_raised = True

    def poll(self) -> bool:
        """Whether any rank had raised the flag at the last call. **Collective**. Waits for the last call's answer only.

        Raises:
            RankTimeoutError: If a rank does not poll in time.
            RankLostError: If a rank is gone.
            PoisonedError: If an earlier failure left the ranks in different places.
        """
        in_flight, seen = self._in_flight, False
        if in_flight is not None:
            self._in_flight = None
            self._control.refuse_if_poisoned()  # a child that was forked in between has nothing to wait for
            self._control.finish(in_flight, _STEP, self._timeout)
            seen = any(map(any, self._buffers.received()))
        self._buffers.sent.data[0] = self._is_raised
        self._in_flight = self._control.start(self._buffers, _STEP, self._timeout)
        return seen

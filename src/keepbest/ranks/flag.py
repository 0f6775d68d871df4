"""A flag that any rank may raise, and that all ranks see at the same moment, without waiting for each other."""

from __future__ import annotations

from datetime import timedelta

from keepbest.ranks.control_group import ControlGroup, Frames, Started

_STEP = "ask whether a rank has raised its flag"


class SharedFlag:
    """Travels while the ranks work: what is raised before one `poll` is seen by all ranks at the next.

    Args:
        control: the ranks.
        timeout: how long a rank waits for one that does not poll.
    """

    def __init__(self, control: ControlGroup, timeout: timedelta) -> None:
        self._control = control
        self._timeout = timeout
        self._frames = Frames(1, control.world_size)
        self._under_way: Started | None = None
        self._is_raised = False

    def raise_it(self) -> None:
        """Let all ranks know. **Rank-local**; may be called from a signal handler."""
        self._is_raised = True

    def poll(self) -> bool:
        """Whether any rank had raised the flag at the last call. **Collective**; waits for that call's news only.

        Raises:
            RankLostError, RankTimeoutError, PoisonedError: as any exchange of the ranks.
        """
        under_way, seen = self._under_way, False
        if under_way is not None:
            self._under_way = None
            self._control.finish(under_way, _STEP, self._timeout)
            seen = any(map(any, self._frames.received()))
        self._frames.sent[0] = self._is_raised
        self._under_way = self._control.start(self._frames, _STEP, self._timeout)
        return seen

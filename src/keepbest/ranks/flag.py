"""A flag that any rank may raise, and that all ranks see at the same moment, without waiting for each other."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from keepbest.errors import DesyncError
from keepbest.ranks.buffers import Buffers
from keepbest.ranks.carrier import InFlight
from keepbest.ranks.control_group import ControlGroup
from keepbest.ranks.difference import describe_difference
from keepbest.ranks.frame import FRAME_BYTES, Frame, digest_place

_STEP = "ask whether a rank has raised its flag"
FLAG_PLACE = digest_place(_STEP, b"")
"""In the frames of ranks that poll."""


class SharedFlag:
    """A flag that travels while the ranks work: if it is raised before one `poll`, all ranks see it at the next.

    Args:
        control: Control group of the ranks.
        timeout: Time that a rank waits for one that does not poll.
    """

    def __init__(self, control: ControlGroup, timeout: timedelta) -> None:
        self._control = control
        self._timeout = timeout
        # As large as other frames, which it meets where a rank does not poll.
        self._buffers = Buffers(FRAME_BYTES, control.world_size)
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
            DesyncError: If a rank did something else than poll.
            PoisonedError: If an earlier failure left the ranks in different places.
        """
        in_flight, seen = self._in_flight, False
        if in_flight is not None:
            self._in_flight = None
            self._control.refuse_if_poisoned()  # a child that was forked in between has nothing to wait for
            self._control.finish(in_flight, _STEP, self._timeout)
            frames = [Frame.unpack(raw) for raw in self._buffers.received()]
            if any(frame.place != FLAG_PLACE for frame in frames):
                raise not_all_poll(self._control, frames, "something else")
            seen = any(frame.value for frame in frames)
        self._buffers.sent.data[:] = Frame(FLAG_PLACE, False, 0, float(self._is_raised), None).pack()
        self._in_flight = self._control.start(self._buffers, _STEP, self._timeout)
        return seen


def not_all_poll(control: ControlGroup, frames: Sequence[Frame], elsewhere: str) -> DesyncError:
    """Return the error for ranks of which some poll, and others do not. No collective may run any more.

    Args:
        control: Control group of the ranks.
        frames: What they sent, by rank.
        elsewhere: What those do that do not poll, in words.
    """
    control.poison = "the ranks are not in the same step"
    # The failure of a rank cannot follow, since those that poll do not come to exchange texts. Its own error has it.
    steps = [
        _STEP if frame.place == FLAG_PLACE else f"{elsewhere}, which failed there" if frame.failed else elsewhere
        for frame in frames
    ]
    return DesyncError(
        f"{describe_difference(steps)}\nEvery rank must train for the same number of updates, and make the same calls."
    )

"""The two ways between a model and the files of a snapshot."""

from __future__ import annotations

from typing import Literal, NamedTuple

from keepbest.capture.gathered import gathered
from keepbest.capture.restore import Restore, restore_gathered, restore_local
from keepbest.capture.share import Capture


class Way(NamedTuple):
    """How weights travel.

    Attributes:
        capture: From the model to what each rank writes.
        restore: The way back.
        is_spread: Whether every rank reads and writes files, rather than rank 0 alone.
    """

    capture: Capture
    restore: Restore
    is_spread: bool


def find_way(kind: Literal["gathered", "local"]) -> Way:
    """The way that a `Format` names in its `capture`, for one keeper: it may remember what was planned."""
    if kind == "gathered":
        return Way(gathered, restore_gathered, is_spread=False)
    from keepbest.capture.local import Local  # torch's distributed checkpoints take half a second to import

    return Way(Local().capture, restore_local, is_spread=True)

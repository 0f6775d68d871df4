"""The two ways between a model and the files of a snapshot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import nn

from keepbest.capture.feed import Stored
from keepbest.capture.gathered import gathered, needs_to_gather
from keepbest.capture.inventory import Inventory
from keepbest.capture.restore import Restored, restore_gathered, restore_local
from keepbest.capture.share import Share
from keepbest.ranks import Ranks
from keepbest.staging.slot import Needs, Staging


class Way(NamedTuple):
    """How weights travel.

    Attributes:
        capture: From the model to what each rank writes. **Collective**; opens no file.
        restore: The way back. **Collective**.
        needs: What the first snapshot will probably need on this rank. **Rank-local**.
        is_local: Whether every rank reads and writes files, rather than rank 0 alone.
    """

    capture: Callable[[Inventory, Staging, str], Share]
    restore: Callable[[nn.Module, Stored, Ranks, str], Restored]
    needs: Callable[[Inventory], Needs]
    is_local: bool


def find_way(kind: Literal["gathered", "local"]) -> Way:
    """The way that a `Format` names in its `capture`, for one keeper: it may remember what was planned."""
    if kind == "gathered":
        return Way(gathered, restore_gathered, needs_to_gather, is_local=False)
    # torch's distributed checkpoints take half a second to import.
    from keepbest.capture.local import Local

    local = Local()
    return Way(local.capture, restore_local, local.needs, is_local=True)

"""Weights on rank 0, captured without a keeper."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from keepbest.capture.gathered import gathered
from keepbest.capture.inventory import Inventory
from keepbest.capture.share import Items, Share
from keepbest.formats.registry import find_format
from keepbest.modules.parts import select_parts
from keepbest.ranks import Ranks
from keepbest.staging.live import Unstaged
from keepbest.staging.slot import Staging


def gather(
    model: nn.Module,
    names: Sequence[str] | None = None,
    *,
    save_frozen_weights: bool = True,
    staging: Staging | None = None,
) -> Share:
    """What rank 0 writes of these parts of the model. **Collective**."""
    items = Items(model, select_parts(model, names), save_frozen_weights)
    return gathered(Inventory(items, find_format("torch"), Ranks.connect()), staging or Unstaged(), "save")

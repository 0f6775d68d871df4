"""From a model to what each rank holds of its weights: nothing is gathered."""

from __future__ import annotations

from typing import Any

import torch

from keepbest.capture.catalogue import Name
from keepbest.capture.foreign import ForeignTransfer
from keepbest.capture.fsdp1 import sharded_state_dict
from keepbest.capture.inventory import Agreed, Inventory, added_by_hooks
from keepbest.capture.plan import plan_shares
from keepbest.capture.share import AllRanks, Share
from keepbest.modules.kinds import has_shards
from keepbest.modules.sources import StateDict
from keepbest.staging.slot import LiveSlot, Staging

_REMEDY = "Every rank needs room and permission to write in the run directory; everything committed before is intact"


def local(inventory: Inventory, staging: Staging, step: str) -> Share:
    """Plan which rank writes what it holds. **Collective**; nothing is gathered.

    The tensors are those of the model, not copies (FSDP1: new shards, for which one unit at a time is gathered), so the
    save is waited for.

    Args:
        inventory: What is to be saved, and what the ranks hold of it.
        staging: Not asked for room.
        step: What is being done, in words.

    Raises:
        KeepBestError, RankFailedError: As `gathered`.
    """
    del staging
    ranks, items = inventory.ranks, inventory.items
    agreed = inventory.settle(step, lambda _: None, saving=False)
    left_out = {part.name: keys for part in items.parts if (keys := agreed.union.left_out(part.name))}
    gone = set[Name]()
    try:
        found = _own_share(agreed, inventory, gone)
    except BaseException as error:  # noqa: BLE001  # lose raises
        ranks.lose("list the shards", error)
    files: dict[str, StateDict] = {name.part: {} for name, _ in agreed.union.kept()}
    for part in items.parts:
        if part.name not in left_out and not part.apart:
            files.setdefault(part.name, {})
    for name, value in found.items():
        if name.part in files:  # the same parts on every rank
            files[name.part][name.key] = value
    tied: dict[str, dict[str, str]] = {part: {} for part in files}
    for name, holding in agreed.union.kept():
        if holding.entry.first and name not in gone:
            tied[name.part][name.key] = holding.entry.first
    return Share(
        parts=items.parts,
        files=files,
        left_out=left_out,
        slot=LiveSlot(),
        writers=AllRanks(ranks, step, _REMEDY),
        plans=plan_shares(files, tied, ranks, step),
    )


def _own_share(agreed: Agreed, inventory: Inventory, gone: set[Name]) -> dict[Name, Any]:
    """What this rank writes: its shards, and of what ranks hold whole that which no lower rank holds.

    What is no tensor goes to rank 0, which alone writes such. A tensor with several names is written under the first.
    Hooks of state_dict() beside units of FSDP1, which it alone can call, may add names, and leave out others: `gone`.
    """
    ranks, kept = inventory.ranks, dict(agreed.union.kept())
    data = [(name, each) for name, each in kept.items() if each.owner != 0 and each.entry.form.role == "data"]
    found: dict[Name, Any] = {}
    with ForeignTransfer(ranks, data, {}) as elsewhere:
        for source in agreed.held.sources:
            state = sharded_state_dict(source) if source.holds_fsdp1 else agreed.held.states[source.path]
            inside = {part.name: source.path_of(part) for part in source.parts}
            for name, holding in kept.items():
                if name.part not in inside or name not in agreed.held.entries:
                    continue
                key = inside[name.part] + name.key
                if source.holds_fsdp1 and key not in state:
                    gone.add(name)
                if holding.entry.first or name in gone:
                    continue
                value = state[key]
                if has_shards(value):
                    found[name] = value
                elif holding.owner == ranks.rank:
                    if holding.entry.form.role == "data" and not ranks.is_main:
                        elsewhere.send(name, value)
                    else:
                        is_tensor = isinstance(value, torch.Tensor)
                        found[name] = value.resolve_conj().resolve_neg() if is_tensor else value
            if source.holds_fsdp1 and ranks.is_main:
                found |= added_by_hooks(source, state, agreed)
    return {**found, **elsewhere.received}

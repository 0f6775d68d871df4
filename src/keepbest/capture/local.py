"""From a model to what each rank holds of its weights: nothing is gathered."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from keepbest.capture.fsdp1 import sharded_state_dict
from keepbest.capture.gathered import cut, listing
from keepbest.capture.plan import plan_shares
from keepbest.capture.share import AllRanks, Items, Share
from keepbest.errors import ConfigError
from keepbest.modules.kinds import has_shards, is_fsdp1
from keepbest.modules.sources import Source, StateDict, list_sources
from keepbest.ranks import Ranks
from keepbest.staging.slot import LiveSlot, Staging

_REMEDY = "Every rank needs room and permission to write in the run directory; everything committed before is intact"


def local(items: Items, ranks: Ranks, staging: Staging, step: str) -> Share:
    """Plan which rank writes what it holds of `items`. **Collective**; nothing is gathered.

    The tensors are those of the model, not copies (FSDP1: new shards, for which one unit at a time is gathered), so the
    save is waited for.

    Args:
        items: What is to be saved.
        ranks: Ranks of the model.
        staging: Not asked for room.
        step: What is being done, in words.

    Raises:
        ConfigError: On every rank, if FSDP1 shards the model over a part of the ranks only.
        KeepBestError, RankFailedError: As `gathered`.
    """
    del staging

    def list_and_check() -> list[Source]:
        listed = list_sources(items.model, items.parts, save_frozen_weights=items.save_frozen_weights)
        for source in listed:
            _refuse_partly_sharded(source.module, ranks)
        return listed

    sources = ranks.agree(
        f"list the weights to {step}", list_and_check, state=lambda found: b"\n".join(map(listing, found))
    )
    files: dict[str, StateDict] = {}
    left_out: dict[str, list[str]] = {}
    try:
        for source in sources:
            state = sharded_state_dict(source)
            for part in source.parts:
                kept, left_out[part.name] = cut(source, part, state)
                if kept or not (left_out[part.name] or part.apart):
                    files[part.name] = {key: value for key, value in kept.items() if ranks.is_main or has_shards(value)}
    except BaseException as error:  # noqa: BLE001  # lose raises
        ranks.lose("list the shards", error)
    return Share(
        parts=items.parts,
        files=files,
        left_out={name: keys for name, keys in left_out.items() if keys},
        slot=LiveSlot(),
        writers=AllRanks(ranks, step, _REMEDY),
        plans=plan_shares(files, ranks, step),
    )


def _refuse_partly_sharded(module: nn.Module, ranks: Ranks) -> None:
    for unit in module.modules():
        if is_fsdp1(unit) and isinstance(unit.process_group, dist.ProcessGroup):
            members = dist.get_process_group_ranks(unit.process_group)
            if members != ranks.members:
                raise ConfigError(
                    f"shards of FSDP1 cannot be saved where units are sharded over ranks {members} of {ranks.members}; "
                    "use format 'torch', or FSDP2"
                )

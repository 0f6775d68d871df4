"""Plans which rank writes what of a snapshot, by torch's planner. **Collective**; opens no file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from keepbest.formats.dcp import SharePlan
from keepbest.modules.quiet import quiet
from keepbest.modules.sources import StateDict
from keepbest.ranks import Ranks

Plans = dict[str, SavePlan]
"""For each part what one rank writes."""


def plan_shares(
    files: Mapping[str, StateDict], tied: Mapping[str, Mapping[str, str]], ranks: Ranks, step: str
) -> dict[str, SharePlan]:
    """What this rank writes of each part. **Collective**.

    Args:
        files: For each part what this rank holds; every rank has the same parts.
        tied: For each part further names of its tensors, and the key of each.
        ranks: Ranks of the model.
        step: What is being done, in words.

    Raises:
        KeepBestError: On every rank, if what the ranks hold does not make whole tensors.
    """
    step = f"plan the shares to {step}"
    planners = {part: DefaultSavePlanner() for part in files}

    def plan_own() -> Plans:
        for part, state in files.items():
            tensors: dict[str, Any] = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
            planners[part].set_up_planner(tensors, storage_meta=None, is_coordinator=ranks.is_main)
        return {part: planner.create_local_plan() for part, planner in planners.items()}

    with quiet():
        own = ranks.agree(step, plan_own)
        everybodys = _gathered(own, ranks)
        planned = ranks.agree(step, lambda: _plan_whole(planners, everybodys) if ranks.is_main else None)
        mine = _scattered(None if planned is None else planned[0], ranks)
    metadata = {} if planned is None else planned[1]
    return {part: SharePlan(planner, mine[part], metadata.get(part), tied[part]) for part, planner in planners.items()}


def _plan_whole(
    planners: Mapping[str, DefaultSavePlanner], everybodys: list[Plans]
) -> tuple[list[Plans], dict[str, Metadata]]:
    """On rank 0: what each rank writes of each part, by rank, and what is known of the whole of each part."""
    plans: list[Plans] = [{} for _ in everybodys]
    metadata: dict[str, Metadata] = {}
    for part, planner in planners.items():
        agreed, metadata[part] = planner.create_global_plan([own[part] for own in everybodys])
        for place, plan in zip(plans, FileSystemWriter("").prepare_global_plan(agreed), strict=True):
            place[part] = plan
    return plans, metadata


def _gathered(own: Plans, ranks: Ranks) -> list[Plans]:
    """On rank 0 what every rank plans, by rank; elsewhere nothing."""
    group = ranks.patient_group()
    if group is None:
        return [own]
    found: list[Plans | None] | None = [None] * ranks.world_size if ranks.is_main else None
    try:
        dist.gather_object(own, found, group=group, group_dst=0)
    except BaseException as error:  # noqa: BLE001  # lose raises
        ranks.lose("gather the plans of the ranks", error)
    return [] if found is None else [plans for plans in found if plans is not None]


def _scattered(plans: list[Plans] | None, ranks: Ranks) -> Plans:
    """What this rank writes, from rank 0."""
    group = ranks.patient_group()
    if group is None and plans is not None:
        return plans[0]
    mine: list[Any] = [None]
    try:
        dist.scatter_object_list(mine, plans, group=group, group_src=0)
    except BaseException as error:  # noqa: BLE001  # lose raises
        ranks.lose("hand out the plans of the ranks", error)
    found: Plans = mine[0]
    return found

"""Plans which rank writes what of a snapshot, by torch's planner. **Collective**; opens no file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem
from torch.distributed.checkpoint.utils import find_state_dict_object

from keepbest.capture.catalogue import Held, Name
from keepbest.capture.union import Union
from keepbest.formats.dcp import SharePlan
from keepbest.modules.kinds import has_shards
from keepbest.modules.quiet import quiet, use_up_warning_of_the_writer
from keepbest.modules.raw_bytes import signed, unsigned
from keepbest.ranks import Ranks
from keepbest.staging.slot import Like, Slot

Plans = dict[str, SavePlan]
"""For each part what one rank writes."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Which rank writes what of weights that are laid out in one way. It stays as long as they do.

    Attributes:
        union: What the ranks agreed to hold.
        mine: For each part what this rank writes.
        metadata: On rank 0, for each part what is known of the whole.
        tied: For each part further names of its tensors, and the key of each.
    """

    union: Union
    mine: Mapping[str, SavePlan]
    metadata: Mapping[str, Metadata]
    tied: Mapping[str, Mapping[str, str]]

    def reserve(self, slot: Slot, held: Held) -> None:
        """Allocate room for what this rank writes, unless it is written from where it is. **Rank-local**."""
        slot.reserve(
            {
                _room_of(part, item): Like(data.chunk.sizes, data.properties.dtype, _device_of(part, item, held), True)
                for part, item, data in self._items()
            }
        )

    def share(self, slot: Slot, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, SharePlan]:
        """What this rank writes of each part, as it is now. **Rank-local**.

        Args:
            slot: Where the values stand until they are written.
            tensors: For each part the tensors that were planned, as this rank holds them now.
        """
        shards: dict[str, dict[MetadataIndex, torch.Tensor]] = {part: {} for part in self.mine}
        states = {part: dict(tensors[part]) for part in self.mine}
        for part, item, _ in self._items():
            value = find_state_dict_object(states[part], item.index).detach()
            is_written_from_there = slot.is_live and value.device.type == "cpu"
            shards[part][item.index] = signed(value) if is_written_from_there else slot.put(_room_of(part, item), value)
        slot.seal()
        return {
            part: SharePlan(_Shards(shards[part]), plan, self.metadata.get(part, Metadata({})), self.tied[part])
            for part, plan in self.mine.items()
        }

    def _items(self) -> Iterator[tuple[str, WriteItem, TensorWriteData]]:
        for part, plan in self.mine.items():
            for item in plan.items:
                if item.tensor_data is None:
                    raise RuntimeError(f"{item.index.fqn} of {part} was planned, and is no tensor")
                yield part, item, item.tensor_data


class _Shards(DefaultSavePlanner):
    """Gives torch's writer the tensors of this rank, wherever they stand."""

    def __init__(self, shards: Mapping[MetadataIndex, torch.Tensor]) -> None:
        super().__init__()
        self._shards = shards

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self._shards[index]


def plan_layout(
    union: Union,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    tied: Mapping[str, Mapping[str, str]],
    ranks: Ranks,
    step: str,
) -> Layout:
    """Plan which rank writes what. **Collective**.

    Args:
        union: What the ranks agreed to hold.
        tensors: For each part what this rank holds; every rank has the same parts.
        tied: For each part further names of its tensors, and the key of each.
        ranks: Ranks of the model.
        step: What is being done, in words.

    Raises:
        KeepBestError: On every rank, if what the ranks hold does not make whole tensors.
    """
    step = f"plan the shares to {step}"
    planners = {part: DefaultSavePlanner() for part in tensors}

    def plan_own() -> Plans:
        for part, state in tensors.items():
            # torch asks whether each is pinned, and gives a view its signs in a copy on the device for that.
            planned = {key: value if has_shards(value) else unsigned(value) for key, value in state.items()}
            planners[part].set_up_planner(planned, storage_meta=None, is_coordinator=ranks.is_main)
        with torch.device("cpu"):  # torch plans with tensors of the default device, which may be any
            return {part: planner.create_local_plan() for part, planner in planners.items()}

    use_up_warning_of_the_writer()
    with quiet(), torch.device("cpu"):  # torch computes with tensors, which would be on the user's default device
        own = ranks.agree(step, plan_own)
        everybodys = _gathered(own, ranks)
        planned = ranks.agree(step, lambda: _plan_whole(planners, everybodys) if ranks.is_main else None)
        mine = _scattered(None if planned is None else planned[0], ranks)
    return Layout(union, mine, {} if planned is None else planned[1], tied)


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


def _device_of(part: str, item: WriteItem, held: Held) -> str:
    entry = held.entries.get(Name(part, item.index.fqn))
    return "cpu" if entry is None else entry.device


def _room_of(part: str, item: WriteItem) -> str:
    return f"{part}/{item.index.fqn}/{item.index.offset}"


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

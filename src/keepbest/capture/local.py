"""From a model to what each rank holds of its weights: nothing is gathered."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from keepbest.capture.catalogue import Name
from keepbest.capture.foreign import ForeignTransfer, own_data
from keepbest.capture.fsdp1 import sharded_state_dict
from keepbest.capture.fsdp1_optimizer import is_of_units, unit_states
from keepbest.capture.inventory import Agreed, Inventory, added_by_hooks
from keepbest.capture.plan import Layout, plan_layout
from keepbest.capture.share import Items, Share, Writers, claiming
from keepbest.capture.spread import spread_over_holders
from keepbest.capture.union import Union
from keepbest.capture.whole_plan import room_of
from keepbest.capture.writers import AllNow, EachAlone
from keepbest.modules.kinds import has_shards, local_of
from keepbest.modules.sources import StateDict
from keepbest.ranks import Ranks
from keepbest.staging.device import every_stream
from keepbest.staging.slot import Like, Needs, Slot, Staging


class Local:
    """Captures what each rank holds, for that rank to write. Each keeper has one, which remembers what was planned.

    Which rank writes what is planned when weights are captured for the first time, and again when they are laid out in
    another way. Else a capture costs one exchange. (Units of FSDP1 are planned and gathered each time.)
    """

    def __init__(self) -> None:
        self._layout: Layout | None = None
        self._spread: tuple[Union, Mapping[Name, int]] | None = None
        self._captured = 0

    def capture(self, inventory: Inventory, staging: Staging, step: str) -> Share:
        """Bring what this rank holds to where it is written from. **Collective**; nothing is gathered.

        Args:
            inventory: What is to be saved, and what the ranks hold of it.
            staging: Where this rank gets room for its share. `Unstaged` shards are those of the model.
            step: What is being done, in words.

        Raises:
            KeepBestError, RankFailedError: As `gathered`.
        """
        layout = self._layout
        with claiming(staging) as claim:

            def reserve(agreed: Agreed) -> None:
                slot = claim()
                if layout is not None and layout.union is agreed.union:
                    layout.reserve(slot, agreed.held)

            agreed = inventory.settle(step, reserve, saving=staging.waits)
            return self._share(inventory, agreed, claim(), step)

    def needs(self, inventory: Inventory) -> Needs:
        """What the share of this rank will probably need; nothing where that is known late. **Rank-local**."""
        rooms, devices = dict[str, Like](), set[torch.device]()
        if any(holding.entry.form.is_in_unit for holding in inventory.union.kept.values()):
            return Needs(rooms, is_sure=False, devices=devices)  # of all parameters in a unit it has the same flat one
        writers, held, rank = self._writers_of_whole(inventory.union), inventory.look(), inventory.ranks.rank
        for name, holding in inventory.union.kept.items():
            value = held.values.get(name)
            if value is None or holding.entry.first or holding.entry.form.is_packed:
                continue
            if has_shards(value) or writers.get(name, holding.owner) == rank:
                local = local_of(value)
                rooms[room_of(name)] = Like(local.shape, local.dtype, local.device.type)
                devices.add(local.device)
        return Needs(rooms, is_sure=False, devices=devices)

    def _share(self, inventory: Inventory, agreed: Agreed, slot: Slot, step: str) -> Share:
        ranks, items = inventory.ranks, inventory.items
        writers = self._writers(ranks, slot, step)
        on_devices = every_stream(entry.device for entry in agreed.held.entries.values())
        with _losing(writers, ranks, "list the shards"), on_devices:
            found, gone = _own_share(agreed, inventory, self._writers_of_whole(agreed.union))
            tensors, data = _sorted_out(found, agreed, items, slot)
        layout = self._layout
        if layout is None or layout.union is not agreed.union or _holds_units(agreed, items):
            tied: dict[str, dict[str, str]] = {part: {} for part in tensors}
            for name, holding in agreed.union.kept.items():
                if holding.entry.first and name not in gone:
                    tied[name.part][name.key] = holding.entry.first
            layout = self._layout = plan_layout(agreed.union, tensors, tied, ranks, step)
            ranks.agree(step, partial(layout.reserve, slot, agreed.held))
        with _losing(writers, ranks, "copy the shards"):
            plans = layout.share(slot, tensors)
        return Share(
            parts=items.parts,
            training_state=tuple(items.training_state),
            files=data,
            left_out=agreed.union.left_out,
            slot=slot,
            writers=writers,
            plans=plans,
            versions=agreed.union.versions,
        )

    def _writers_of_whole(self, union: Union) -> Mapping[Name, int]:
        if self._spread is None or self._spread[0] is not union:
            self._spread = union, spread_over_holders(union)
        return self._spread[1]

    def _writers(self, ranks: Ranks, slot: Slot, step: str) -> Writers:
        if slot.is_live:
            return AllNow(ranks, step)
        self._captured += 1
        return EachAlone(ranks, ranks.mailbox(), self._captured, step, time.monotonic())


@contextmanager
def _losing(writers: Writers, ranks: Ranks, step: str) -> Iterator[None]:
    """Report what fails here to the threads of the others, which are past the exchange, and then as `Ranks.lose`."""
    try:
        yield
    except BaseException as error:  # noqa: BLE001  # lose raises
        try:
            if isinstance(writers, EachAlone):
                writers.give_up(error)
        finally:
            ranks.lose(step, error)


def _sorted_out(
    found: Mapping[Name, Any], agreed: Agreed, items: Items, slot: Slot
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, dict[str, Any]]]:
    """For each part, the same on every rank, the tensors of what was found, and what is no weight."""
    kept = agreed.union.kept
    tensors: dict[str, dict[str, torch.Tensor]] = {part: {} for part in agreed.union.files_of(items)}
    data: dict[str, dict[str, Any]] = {part: {} for part in tensors}
    for name, value in found.items():
        if name.part not in tensors:
            continue
        is_data = name in kept and kept[name].entry.form.role == "data"
        if isinstance(value, torch.Tensor) and not is_data:
            tensors[name.part][name.key] = value
        else:
            data[name.part][name.key] = own_data(value, slot)
    return tensors, data


def _holds_units(agreed: Agreed, items: Items) -> bool:
    """Whether a rank has units of FSDP1, whose shards are made anew by each `state_dict()`, hooks and all."""
    in_units = (holding.entry.form.is_in_unit for holding in agreed.union.kept.values())
    return any(in_units) or any(map(is_of_units, items.training_state.values()))


def _own_share(agreed: Agreed, inventory: Inventory, writers: Mapping[Name, int]) -> tuple[dict[Name, Any], set[Name]]:
    """What this rank writes: its shards, and of what ranks hold whole that of which it is the writer. **Collective**.

    What is no tensor goes to rank 0, which alone writes such. A tensor with several names is written under the first.
    Hooks of state_dict() beside units of FSDP1, which it alone can call, may add names, and leave out others: these are
    returned too.
    """
    ranks, items, kept, sources = inventory.ranks, inventory.items, agreed.union.kept, agreed.held.sources
    of_units = unit_states(items, ranks, is_whole=False)
    found: dict[Name, Any] = {name: value for name, value in of_units if ranks.is_main or has_shards(value)}
    held = agreed.held.states
    states = {each.path: sharded_state_dict(each) if each.holds_fsdp1 else held[each.path] for each in sources}
    values, gone = _first_values(agreed, items, states)
    data = [(name, each) for name, each in kept.items() if each.owner != 0 and each.entry.form.role == "data"]
    with ForeignTransfer(ranks, data, {}) as elsewhere:
        for name, value in values.items():
            holding = kept[name]
            if has_shards(value):
                found[name] = value
            elif writers.get(name, holding.owner) == ranks.rank:
                if holding.entry.form.role == "data" and not ranks.is_main:
                    elsewhere.send(name, value)
                else:
                    found[name] = value
    for source in sources if ranks.is_main else ():
        if source.holds_fsdp1:
            found |= added_by_hooks(source, states[source.path], agreed)
    return {**found, **elsewhere.received}, gone


def _first_values(agreed: Agreed, items: Items, states: Mapping[str, StateDict]) -> tuple[dict[Name, Any], set[Name]]:
    """What of the kept this rank holds, each under its first name, and what the `states` of its sources leave out."""
    kept, held = agreed.union.kept, agreed.held
    values, gone = dict[Name, Any](), set[Name]()
    for source in held.sources:
        state = states[source.path]
        inside = {part.name: source.path_of(part) for part in source.parts}
        for name in (each for each in kept if each.part in inside and each in held.entries):
            key = inside[name.part] + name.key
            if source.holds_fsdp1 and key not in state:
                gone.add(name)
            elif not kept[name].entry.first:
                values[name] = state[key]
    of_states = (name for name in kept if name.part in items.training_state and name in held.values)
    return values | {name: held.values[name] for name in of_states}, gone

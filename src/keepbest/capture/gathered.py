"""From a model, however it is distributed, to full CPU tensors on rank 0."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from keepbest.capture.catalogue import Name
from keepbest.capture.foreign import ForeignTransfer, own_data
from keepbest.capture.fsdp1 import fsdp1_state_dict
from keepbest.capture.fsdp1_optimizer import unit_states
from keepbest.capture.inventory import Agreed, Inventory, added_by_hooks
from keepbest.capture.share import Share, claiming
from keepbest.capture.transfer import ShardTransfer
from keepbest.capture.union import Holding
from keepbest.capture.whole import whole_tensor
from keepbest.capture.whole_plan import like, room_of
from keepbest.capture.writers import main_alone, nobody
from keepbest.errors import SnapshotError
from keepbest.modules.kinds import is_dtensor
from keepbest.modules.sources import Source, StateDict
from keepbest.ranks import Ranks
from keepbest.staging.device import every_stream
from keepbest.staging.live import LiveSlot
from keepbest.staging.slot import Needs, Slot, Staging

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def gathered(inventory: Inventory, staging: Staging, step: str) -> Share:
    """Bring the weights of a model to rank 0, which writes them. **Collective**.

    No rank holds more than one whole parameter at a time beside what rank 0 keeps (FSDP1: one unit, which gloo has
    twice while it gathers it), and none of it where shards can be sent: see `ShardTransfer`.

    Args:
        inventory: What is to be saved, and what the ranks hold of it.
        staging: Where rank 0 gets room for the weights. `Unstaged` weights of a plain CPU model are the live tensors.
        step: What is being done, in words.

    Raises:
        KeepBestError: As `Inventory.settle`, before any weight moved. On every rank, if rank 0 has no room for them.
        RankFailedError: On a rank that fails while weights are on their way, and, once the timeout of the process group
            that shards the model ends their wait, on the others. No further collective may run then (`PoisonedError`).
    """
    ranks = inventory.ranks
    shards = ShardTransfer(ranks)
    with claiming(staging) as claim:

        def reserve(agreed: Agreed) -> None:
            # While a lack of memory is an error that every rank can raise.
            if ranks.is_main:
                claim().reserve(inventory.plan.rooms)
            if not inventory.plan.is_simple:
                shards.reserve(_sharded(agreed))

        agreed = inventory.settle(step, reserve, saving=staging.waits)  # rank 0 may have to wait for a write
        slot = claim() if ranks.is_main else LiveSlot()
        try:
            if inventory.plan.is_simple:
                files = _take(inventory, agreed, slot)
            else:
                with every_stream(entry.device for entry in agreed.held.entries.values()):
                    files = _files_of(inventory, _gather(inventory, agreed, slot, shards), agreed)
        except BaseException as error:  # noqa: BLE001  # lose raises
            ranks.lose("gather the weights", error)
    return Share(
        parts=inventory.items.parts,
        training_state=tuple(inventory.items.training_state),
        files=files,
        left_out=agreed.union.left_out,
        slot=slot,
        writers=main_alone if ranks.is_main else nobody,
        versions=agreed.union.versions,
    )


def needs_to_gather(inventory: Inventory) -> Needs:
    """What the tensors of a snapshot need on this rank. **Rank-local**."""
    if not inventory.ranks.is_main:
        return Needs({}, is_sure=True, devices=frozenset())
    plan, devices = inventory.plan, frozenset[torch.device]()
    if plan.is_simple:
        values = inventory.look().values
        devices = frozenset(values[name].device for name, _ in plan.copied)
    return Needs(plan.rooms, is_sure=True, devices=devices)


def _take(inventory: Inventory, agreed: Agreed, slot: Slot) -> Mapping[str, StateDict]:
    """State dicts of the parts, of values that rank 0 holds all of."""
    if not inventory.ranks.is_main:
        return {}
    copied = slot.put_all(inventory.batch_of(agreed.held))
    slot.seal()
    return inventory.plan.files_in(copied)


def _sharded(agreed: Agreed) -> Iterator[DTensor]:
    """What this rank holds of tensors that may be moved to rank 0 shard by shard."""
    values = agreed.held.values
    for name, holding in agreed.union.kept.items():
        if holding.owner == 0 and not holding.entry.first and is_dtensor(value := values.get(name)):
            yield value


def _gather(inventory: Inventory, agreed: Agreed, slot: Slot, transfer: ShardTransfer) -> dict[Name, Any]:
    """On rank 0 all that is kept, whole. Every rank goes through the entries in the same order."""
    ranks = inventory.ranks
    kept = agreed.union.kept.items()
    foreign = {name: holding for name, holding in kept if holding.owner != 0 and not holding.entry.first}
    rooms = {
        name: slot.room(room_of(name), like(holding))
        for name, holding in foreign.items()
        if ranks.is_main and not holding.entry.form.is_packed
    }
    found: dict[Name, Any] = {}
    with ForeignTransfer(ranks, foreign.items(), rooms) as elsewhere, transfer as shards, torch.no_grad():
        new_receiver = partial(_Receiver, agreed, ranks, slot, shards, elsewhere)
        for source in agreed.held.sources:
            receiver = new_receiver()
            if source.holds_fsdp1:
                state = fsdp1_state_dict(source, partial(receiver.take, source))
            else:
                state = agreed.held.states[source.path]
            found |= receiver.receive(source, state)
        found |= new_receiver().receive_states(inventory.items.training_state)
        of_units = unit_states(inventory.items, ranks, is_whole=True)
        found |= {name: _copied(name, value, slot) for name, value in of_units}
    slot.seal()
    return {**found, **elsewhere.received}


def _files_of(inventory: Inventory, found: dict[Name, Any], agreed: Agreed) -> dict[str, StateDict]:
    """State dicts of the parts, in the order that the ranks agreed on."""
    if not inventory.ranks.is_main:
        return {}
    files: dict[str, StateDict] = {}
    for name, holding in agreed.union.kept.items():
        first = Name(name.part, holding.entry.first or name.key)
        if (value := found.get(name, found.get(first, _NOTHING))) is _NOTHING:
            if holding.owner == 0 and not holding.entry.form.is_in_unit:
                continue  # a hook of state_dict() leaves it out, which FSDP1 alone can call
            raise SnapshotError(f"{str(name)!r} was in the model when the keeper looked, but not when it was saved")
        files.setdefault(name.part, {})[name.key] = value
    for name, value in found.items():
        if name not in agreed.union.holdings:  # what hooks of state_dict() add, which FSDP1 alone can call
            files.setdefault(name.part, {})[name.key] = value
    written = files.keys() | agreed.union.files_of(inventory.items)
    return {part: files.get(part, {}) for part in inventory.items.names if part in written}


_NOTHING = object()


def _copied(name: Name, value: Any, slot: Slot) -> Any:
    """What only this state dict has, and is about to be gone."""
    return slot.copy(room_of(name), value) if isinstance(value, torch.Tensor) else own_data(value, slot)


class _Receiver:
    """Brings each tensor of one source to the slot of rank 0, full, once. Other ranks keep nothing."""

    def __init__(
        self,
        agreed: Agreed,
        ranks: Ranks,
        slot: Slot,
        shards: ShardTransfer,
        elsewhere: ForeignTransfer,
    ) -> None:
        self._agreed = agreed
        self._kept = agreed.union.kept
        self._ranks = ranks
        self._slot = slot
        self._shards = shards
        self._elsewhere = elsewhere
        # By the owner, and the id of the tensor itself or of what it was made from.
        self._moved: dict[tuple[int, int], torch.Tensor] = {}

    def take(self, source: Source, key: str, value: torch.Tensor) -> torch.Tensor | None:
        """What becomes of a full parameter of FSDP1 that is about to be gone, if it is to be kept. **Rank-local**."""
        for part in source.parts:
            inside = source.key_in(part, key)
            name = None if inside is None else Name(part.name, inside)
            if name is None or name not in self._kept or self._kept[name].owner != self._ranks.rank:
                continue
            if not self._ranks.is_main:
                if not self._kept[name].entry.first:
                    self._elsewhere.send(name, value)
                return None
            copy = self._slot.copy(room_of(name), value)
            self._moved[id(copy), 0] = copy
            return copy
        return None

    def receive(self, source: Source, state: StateDict) -> dict[Name, Any]:
        """What of `state` stays on rank 0. **Collective** for sharded tensors; tied ones are moved once."""
        found: dict[Name, Any] = {}
        inside = {part.name: source.path_of(part) for part in source.parts}
        for name, holding in self._kept.items():
            if name.part in inside and name in self._agreed.held.entries:
                key = inside[name.part] + name.key
                if key in state or not source.holds_fsdp1:
                    if holding.entry.first and (first := Name(name.part, holding.entry.first)) in found:
                        found[name] = found[first]
                    else:
                        found[name] = self._receive(name, holding, state[key])
        if source.holds_fsdp1 and self._ranks.is_main:
            added = added_by_hooks(source, state, self._agreed)
            found |= {name: _copied(name, value, self._slot) for name, value in added.items()}
        return found

    def receive_states(self, parts: Container[str]) -> dict[Name, Any]:
        """What of the training states stays on rank 0. **Collective** for sharded tensors."""
        held = self._agreed.held.values
        mine = [(name, holding) for name, holding in self._kept.items() if name.part in parts and name in held]
        return {name: self._receive(name, holding, held[name]) for name, holding in mine}

    def _receive(self, name: Name, holding: Holding, value: Any) -> Any:
        if holding.entry.form.role == "data":
            if holding.owner != self._ranks.rank:
                return None
            return own_data(value, self._slot) if self._ranks.is_main else self._elsewhere.send(name, value)
        if (holding.entry.form.is_in_unit and not self._ranks.is_main) or value is None:
            return None  # `take` sent it where it had to be
        # Names of one tensor may have several owners: what is tied on this rank need not be on a lower one.
        place = id(value), holding.owner
        if place not in self._moved:
            self._moved[place] = self._move(name, holding, value)
        return self._moved[place]

    def _move(self, name: Name, holding: Holding, value: torch.Tensor) -> torch.Tensor:
        if is_dtensor(value) and holding.owner == 0 and self._shards.can_move(value):
            room = partial(self._slot.room, room_of(name), like(holding))
            return self._shards.move(value, room, holding.number)
        whole = whole_tensor(value) if is_dtensor(value) else value.detach()
        if self._ranks.is_main and holding.owner == 0:
            # What was made whole is freed before the next one is.
            return (self._slot.copy if is_dtensor(value) else self._slot.put)(room_of(name), whole)
        if self._ranks.rank == holding.owner:
            self._elsewhere.send(name, whole)
        return torch.empty(0, device="cpu")

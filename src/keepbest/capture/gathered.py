"""From a model, however it is distributed, to full CPU tensors on rank 0."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from functools import partial
from types import NoneType
from typing import cast

import torch

from keepbest.capture.fsdp1 import fsdp1_state_dict
from keepbest.capture.share import Items, Share, main_alone
from keepbest.capture.transfer import ShardTransfer
from keepbest.errors import SnapshotError
from keepbest.modules.kinds import is_dtensor
from keepbest.modules.parts import Part
from keepbest.modules.sources import Source, StateDict, list_sources, plain_state_dict
from keepbest.ranks import Ranks
from keepbest.staging.slot import LiveSlot, Slot, Staging


def gathered(items: Items, ranks: Ranks, staging: Staging, step: str) -> Share:
    """Bring the weights of `items` to rank 0, which writes them. **Collective**.

    No rank holds more than one whole parameter at a time beside what rank 0 keeps (FSDP1: one unit, which gloo has
    twice while it gathers it).

    Args:
        items: What is to be saved.
        ranks: Ranks of the model.
        staging: Where rank 0 gets room for the weights. `Unstaged` weights of a plain CPU model are the live tensors.
        step: What is being done, in words.

    Raises:
        KeepBestError: As `Ranks.agree`, before any weight moved: if a rank lists other weights than the others, or a
            weight is on the meta device or is no plain data.
        RankFailedError: On a rank that fails while weights are on their way, and, once the timeout of the process group
            that shards the model ends their wait, on the others. No further collective may run then (`PoisonedError`).
    """
    sources, slot = _list_and_claim(items, ranks, staging, step)
    files: dict[str, StateDict] = {}
    left_out: dict[str, list[str]] = {}
    try:
        for source in sources:
            receiver = _Receiver(source, ranks, slot)
            if source.holds_fsdp1:
                state = fsdp1_state_dict(source, receiver.take)
            else:
                state = plain_state_dict(source)
            for part in source.parts:
                kept, left_out[part.name] = cut(source, part, state)
                full = receiver.receive(part, kept)
                # A flat FSDP1 parameter around submodels may, or may not, hold weights of the composite itself.
                if full or not (left_out[part.name] or part.apart):
                    files[part.name] = full
    except BaseException as error:  # noqa: BLE001  # lose raises
        slot.release()
        ranks.lose("gather the weights", error)
    return Share(
        parts=items.parts,
        files=files if ranks.is_main else {},
        left_out={name: keys for name, keys in left_out.items() if keys},
        slot=slot,
        writers=main_alone,
    )


def _list_and_claim(items: Items, ranks: Ranks, staging: Staging, step: str) -> tuple[list[Source], Slot]:
    """The sources that all ranks agree on, and room for their weights on rank 0."""
    # Ranks that list different weights would wait for each other forever, so they compare their lists first.
    slot: Slot = LiveSlot()

    def list_and_claim() -> list[Source]:
        nonlocal slot
        listed = list_sources(items.model, items.parts, save_frozen_weights=items.save_frozen_weights)
        if ranks.is_main:
            slot = staging.claim()
        return listed

    try:
        sources = ranks.agree(
            f"list the weights to {step}",
            list_and_claim,
            state=lambda sources: b"\n".join(map(listing, sources)),
            saving=staging.waits,  # rank 0 may have to wait for a write before it has a slot
        )
    except BaseException:
        # Nothing moved, and the ranks may continue: a slot that is not given back would be waited for in vain.
        slot.release()
        raise
    return sources, slot


def listing(source: Source) -> bytes:
    """What the ranks compare before weights move: names, shapes and kinds of what `source` holds.

    Raises:
        SnapshotError: If something in it cannot be saved.
    """
    if source.holds_fsdp1:
        names = {source.names.plain(key) for key, _ in source.module.named_parameters(remove_duplicate=False)}
        return f"{source.path}: {sorted(names)}".encode()
    lines = [f"{source.path}:"]
    for key, value in plain_state_dict(source).items():
        if isinstance(value, torch.Tensor):
            if value.is_meta:
                raise SnapshotError(f"{key!r} is on the meta device: it has no values that could be saved")
            placements = f" {value.placements}" if is_dtensor(value) else ""
            lines.append(f"{key} {tuple(value.shape)} {value.dtype}{placements}")
        elif not _is_plain_data(value):
            raise SnapshotError(
                f"{key!r} in the state dict is a {type(value).__name__}; only tensors, numbers, strings and containers "
                "of them can be loaded without running code. Return one of these from get_extra_state()"
            )
    return " ".join(lines).encode()


def cut(source: Source, part: Part, state: StateDict) -> tuple[StateDict, list[str]]:
    """The entries of `part`, and the keys that are left out since they are frozen."""
    entries = {key: name for key in state if (name := source.key_in(part, key)) is not None}
    frozen = sorted(name for key, name in entries.items() if source.is_frozen(key))
    if frozen and all(key in source.buffers or source.is_frozen(key) for key in entries):
        return {}, sorted(entries.values())
    return {name: state[key] for key, name in entries.items() if not source.is_frozen(key)}, frozen


class _Receiver:
    """Brings each tensor of one source to the slot of rank 0, full, once. Other ranks keep nothing."""

    def __init__(self, source: Source, ranks: Ranks, slot: Slot) -> None:
        self._source = source
        self._ranks = ranks
        self._slot = slot
        self._moved: dict[int, torch.Tensor] = {}  # by the id of the tensor itself and of what it was made from

    def take(self, key: str, value: torch.Tensor) -> torch.Tensor | None:
        """A copy on rank 0 of a full parameter that is about to be gone, if it is to be kept. **Rank-local**."""
        is_in_a_part = any(self._source.key_in(part, key) is not None for part in self._source.parts)
        if not self._ranks.is_main or not is_in_a_part or self._source.is_frozen(key):
            return None
        copy = self._slot.copy(self._name(key), value)
        self._moved[id(copy)] = copy
        return copy

    def receive(self, part: Part, state: StateDict) -> StateDict:
        """What of `state` stays on rank 0. **Collective** for sharded tensors; tied ones are moved once."""
        full: StateDict = {}
        with torch.no_grad(), ShardTransfer(self._ranks) as transfer:
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and id(value) not in self._moved:
                    self._moved[id(value)] = self._move(self._source.path_of(part) + key, value, transfer)
                full[key] = self._moved[id(value)] if isinstance(value, torch.Tensor) else value
        return full if self._ranks.is_main else {}

    def _move(self, key: str, value: torch.Tensor, transfer: ShardTransfer) -> torch.Tensor:
        if is_dtensor(value) and transfer.can_move(value):
            return transfer.move(value, partial(self._slot.room, self._name(key), value))
        whole = (value.full_tensor() if is_dtensor(value) else value).detach()
        if not self._ranks.is_main:
            return whole.new_empty(0)
        return self._slot.put(self._name(key), whole)

    def _name(self, key: str) -> str:
        return f"{self._source.path}/{key}"


def _is_plain_data(value: object) -> bool:
    # Exact classes: one that is derived from them, such as a named tuple or numpy's float64, would not be read again.
    if type(value) in (dict, OrderedDict):
        entries = cast("Mapping[object, object]", value)
        return all(_is_plain_data(key) and _is_plain_data(entry) for key, entry in entries.items())
    if type(value) in (list, tuple, set):
        return all(map(_is_plain_data, cast("Iterable[object]", value)))
    return type(value) in (NoneType, bool, int, float, complex, str, bytes) or isinstance(value, torch.Tensor)

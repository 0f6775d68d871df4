"""From a model, in whatever way it is distributed, to full CPU tensors on rank 0."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import cast

import torch
from torch import nn

from keepbest.capture.fsdp1 import fsdp1_state_dict
from keepbest.capture.transfer import ShardTransfer
from keepbest.errors import SnapshotError
from keepbest.modules.kinds import is_dtensor
from keepbest.modules.parts import Part
from keepbest.modules.sources import Source, StateDict, list_sources, plain_state_dict
from keepbest.modules.wrappers import plain_key
from keepbest.ranks import Ranks
from keepbest.staging.host import Staging, StagingBuffer


@dataclass(frozen=True, slots=True)
class Weights:
    """What a snapshot holds.

    Attributes:
        files: for each part name a state dict with plain keys and full tensors on the CPU; empty on ranks other than 0.
            Without a staging buffer, tensors of an unsharded CPU model are the live ones, not copies.
        parts: all that were selected, in order.
        left_out: for each part name the keys (relative to the part) that were left out because they were frozen. A
            part that is frozen as a whole has no file.
        buffer: that holds the tensors, if they were staged.
    """

    parts: tuple[Part, ...]
    files: Mapping[str, StateDict]
    left_out: Mapping[str, list[str]]
    buffer: StagingBuffer | None = None


def take_snapshot(
    model: nn.Module,
    parts: Sequence[Part],
    *,
    save_frozen_weights: bool,
    ranks: Ranks,
    staging: Staging | None = None,
) -> Weights:
    """Bring the weights of `parts` to rank 0. **Collective**.

    No rank holds more than one whole parameter at a time beside what rank 0 keeps (FSDP1: one unit, which gloo has
    twice while it gathers it).

    Args:
        model: plain or wrapped.
        parts: of it.
        save_frozen_weights: whether parameters that do not require grad are among the weights.
        ranks: of the model.
        staging: on all ranks, or on none: rank 0 copies everything into a buffer of it, so that the model may change
            while the snapshot is written; the caller releases the buffer.

    Raises:
        KeepBestError: as `Ranks.agree`, before any weight moved: if a rank lists other weights than the others, or a
            weight is on the meta device or is no plain data.
        RankFailedError: on a rank that fails while weights are on their way, and, once the timeout of the process group
            that shards the model ends their wait, on the others. No further collective may run then (`PoisonedError`).
    """
    # Ranks that list different weights would wait for each other for ever; so they show each other their lists first.
    buffer: StagingBuffer | None = None

    def list_and_claim() -> list[Source]:
        nonlocal buffer
        listed = list_sources(model, parts, save_frozen_weights=save_frozen_weights)
        if staging is not None and ranks.is_main:
            buffer = staging.claim()
        return listed

    try:
        sources = ranks.agree(
            "list the weights",
            list_and_claim,
            state=lambda sources: b"\n".join(map(listing, sources)),
            saving=staging is not None,  # rank 0 may have to wait for a write before it has a buffer
        )
    except BaseException:
        # Nothing moved, and the ranks may go on: a buffer that is not given back would be waited for in vain.
        if staging is not None and buffer is not None:
            staging.release(buffer)
        raise
    files: dict[str, StateDict] = {}
    left_out: dict[str, list[str]] = {}
    try:
        for source in sources:
            receiver = _Receiver(source, ranks, buffer)
            if source.holds_fsdp1:
                state = fsdp1_state_dict(source.module, receiver.take)
            else:
                state = plain_state_dict(source.module)
            for part in source.parts:
                kept, left_out[part.name] = cut(source, part, state)
                full = receiver.receive(part, kept)
                # A flat FSDP1 parameter around submodels may, or may not, hold weights of the composite itself.
                if full or not (left_out[part.name] or part.apart):
                    files[part.name] = full
    except BaseException as error:  # noqa: BLE001  # lose raises
        ranks.lose("gather the weights", error)
    return Weights(
        parts=tuple(parts),
        files=files if ranks.is_main else {},
        left_out={name: keys for name, keys in left_out.items() if keys},
        buffer=buffer,
    )


def listing(source: Source) -> bytes:
    """What the ranks compare before weights move: the names, shapes and kinds of what `source` holds.

    Raises:
        SnapshotError: if something in it cannot be saved.
    """
    if source.holds_fsdp1:
        names = {plain_key(source.module, key) for key, _ in source.module.named_parameters(remove_duplicate=False)}
        return f"{source.path}: {sorted(names)}".encode()
    lines = [f"{source.path}:"]
    for key, value in plain_state_dict(source.module).items():
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
    buffers = {plain_key(source.module, key) for key, _ in source.module.named_buffers(remove_duplicate=False)}
    if frozen and all(key in buffers or source.is_frozen(key) for key in entries):
        return {}, sorted(entries.values())
    return {name: state[key] for key, name in entries.items() if not source.is_frozen(key)}, frozen


class _Receiver:
    """Brings the tensors of one source to where they stay: on rank 0, full, on the CPU, each once; else nowhere."""

    def __init__(self, source: Source, ranks: Ranks, buffer: StagingBuffer | None) -> None:
        self._source = source
        self._ranks = ranks
        self._buffer = buffer
        self._moved: dict[int, torch.Tensor] = {}  # what stays, by the id of itself and of what it was made from

    def take(self, key: str, value: torch.Tensor) -> torch.Tensor | None:
        """A copy on rank 0 of a full parameter that is about to be gone, if it is to be kept. **Rank-local**."""
        is_in_a_part = any(self._source.key_in(part, key) is not None for part in self._source.parts)
        if not self._ranks.is_main or not is_in_a_part or self._source.is_frozen(key):
            return None
        copy = value.to("cpu", copy=True) if self._buffer is None else self._buffer.fill(self._name(key), value)
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
            into = None if self._buffer is None else self._buffer.tensor(self._name(key), value)
            return transfer.move(value, into)
        whole = (value.full_tensor() if is_dtensor(value) else value).detach()
        if not self._ranks.is_main:
            return whole.new_empty(0)
        return whole.cpu() if self._buffer is None else self._buffer.fill(self._name(key), whole)

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

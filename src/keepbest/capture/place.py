"""From state dicts on rank 0 into a model, however it is wrapped and sharded: the way back of `gathered`."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from keepbest.capture.compare import by_source_key, compare
from keepbest.capture.fsdp1 import fsdp1_state_dict, full_fsdp1_state
from keepbest.modules.kinds import is_dtensor
from keepbest.modules.parts import Part
from keepbest.modules.sources import Source, StateDict, list_sources, plain_state_dict
from keepbest.ranks import Ranks


def place_weights(
    model: nn.Module,
    parts: Sequence[Part],
    files: Mapping[str, StateDict],
    left_out: Mapping[str, Sequence[str]],
    *,
    ranks: Ranks,
) -> None:
    """Put saved weights into `parts` of `model`. **Collective**.

    Each tensor travels once, from rank 0; sharded models take their shard of it and drop the rest (FSDP1 holds the
    full weights of a unit while it loads).

    Args:
        model: Model, plain or wrapped. Another strategy and another number of ranks than saved it are fine.
        parts: Parts that were saved.
        files: On rank 0, the state dict of each part by name, full tensors with plain keys; ignored elsewhere.
        left_out: On rank 0, the keys of each part that were frozen and not saved. Exactly these may be missing.
        ranks: Ranks of the model.

    Raises:
        SnapshotError: On every rank, if keys or shapes differ from the model's. The model is then as it was.
        RankFailedError: If the model itself refuses the weights on a rank, or a rank is lost; parts may be loaded then.
        KeepBestError: As `Ranks.agree`.
    """

    def find() -> tuple[list[Source], dict[str, StateDict]]:
        found = list_sources(model, parts, save_frozen_weights=True)
        return found, {source.path: plain_state_dict(source) for source in found if not source.holds_fsdp1}

    sources, present = ranks.agree("find the saved parts in the model", find)
    try:
        # Only a gathered state dict of FSDP1 has the names and shapes; they are there on rank 0, which compares.
        present |= {source.path: fsdp1_state_dict(source, _layout) for source in sources if source.holds_fsdp1}
    except BaseException as error:  # noqa: BLE001  # lose raises
        ranks.lose("find the saved parts in the model", error)
    layout = ranks.broadcast(
        "compare the saved weights with the model",
        lambda: [_kinds_of(compare(source, present[source.path], files, left_out)) for source in sources],
    )
    for source, keys in zip(sources, layout, strict=True):
        try:
            saved = by_source_key(source, files) if ranks.is_main else {}
            state: StateDict = {}
            for key, kind in keys:
                target = present[source.path].get(key)
                value = _sent(saved.get(key), kind, ranks)
                state[source.names.key(key)] = _localized(value, target)
            if source.holds_fsdp1:
                _load_fsdp1(source.module, state)
        except BaseException as error:  # noqa: BLE001  # lose raises
            ranks.lose("load the weights", error)
        if not source.holds_fsdp1:
            place = partial(source.module.load_state_dict, state, strict=False)
            ranks.agree("load the weights", place)


def _layout(_: str, value: torch.Tensor) -> torch.Tensor:
    return value.to("meta")


def _kinds_of(saved: StateDict) -> list[tuple[str, Any]]:
    """Names and kinds of what is sent, for the other ranks."""
    return [(key, _kind(value)) for key, value in saved.items()]


def _kind(value: object) -> Any:
    """What other ranks must know to receive `value`: shape and dtype of a tensor, or plain data itself as bytes.

    Bytes, since JSON has no tensors and would make lists of tuples.
    """
    if isinstance(value, torch.Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    torch.save(value, packed := io.BytesIO())
    return {"data": base64.b64encode(packed.getbuffer()).decode()}


def _sent(value: Any, kind: Mapping[str, Any], ranks: Ranks) -> Any:
    if "data" in kind:
        return torch.load(io.BytesIO(base64.b64decode(kind["data"])), map_location="cpu", weights_only=True)
    tensor = value.contiguous() if ranks.is_main else torch.empty(kind["shape"], dtype=getattr(torch, kind["dtype"]))
    if ranks.control_group is not None and tensor.numel():
        # Bytes, since gloo does not know every dtype.
        dist.broadcast(tensor.view(-1).view(torch.uint8), group=ranks.control_group, group_src=0)
    return tensor


def _localized(value: Any, target: Any) -> Any:
    """This rank's shard of `value`, where `target` is sharded. No communication."""
    if not is_dtensor(target):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh = target.device_mesh
    whole = DTensor.from_local(value.to(target.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=target.placements)


def _load_fsdp1(module: nn.Module, state: StateDict) -> None:
    with full_fsdp1_state(module, rank0_only=False):
        module.load_state_dict(state, strict=False)

"""Room for saved values, in the layout of their targets in the model. **Rank-local**."""

from __future__ import annotations

from typing import Any

import torch

from keepbest.capture.contents import Kind
from keepbest.modules.kinds import has_shards, is_dense, is_dtensor, local_of


def room_for(kind: Kind, target: Any) -> torch.Tensor:
    """An empty tensor for a dense value of this kind, of which a sharded one holds the shard of this rank.

    Args:
        kind: Kind of the saved value.
        target: What the model has in its place. The shards that FSDP1 gives are copies, so they are the room.
    """
    if is_dtensor(target):
        from torch.distributed.tensor import DTensor

        local = torch.empty(target.to_local().shape, dtype=kind.dtype, device=target.device)
        mesh, placements = target.device_mesh, target.placements
        return DTensor.from_local(
            local, mesh, placements, run_check=False, shape=target.shape, stride=target.detach().stride()
        )
    if has_shards(target):
        shards: torch.Tensor = target
        return shards
    return torch.empty(kind.shape, dtype=kind.dtype, device="cpu")


def laid_out_like(value: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """A copy of `value` whose elements lie in memory as those of `model`, if they have one shape.

    Fused optimizers go through the memory of a parameter and of its state side by side.
    """
    model = model.detach()
    if value.shape != model.shape or is_dtensor(value) != is_dtensor(model) or not is_dense(local_of(model)):
        return value.clone()
    local, device = local_of(model), local_of(value).device
    copy = torch.empty_like(local, dtype=value.dtype, device=device).copy_(local_of(value))
    if not is_dtensor(value):
        return copy
    from torch.distributed.tensor import DTensor

    mesh, placements = value.device_mesh, value.placements
    return DTensor.from_local(copy, mesh, placements, run_check=False, shape=value.shape, stride=value.stride())


def localized(value: Any, target: Any) -> Any:
    """This rank's shard of the whole `value`, where `target` is sharded. No communication."""
    if not is_dtensor(target):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    if not value.numel() and value.shape == target.shape:
        # Of what has rows without elements, FSDP2 gives each rank none of them, and torch would give it its share.
        return target.detach().to(value.dtype)
    mesh = target.device_mesh
    whole = DTensor.from_local(value.to(target.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=target.placements)

"""Whole tensors of what is sharded. **Collective**."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def whole_tensor(tensor: DTensor) -> torch.Tensor:
    """All values of a DTensor, on every rank of its mesh, where its shards are. **Collective** over the mesh.

    The values travel as bytes, since gloo and NCCL do not know every dtype. Shards that are offloaded to the CPU travel
    on the device of their mesh, since its group may not know the CPU.
    """
    from torch.distributed.tensor import DTensor

    local = tensor.to_local().detach().resolve_conj().resolve_neg().contiguous()
    if not tensor.numel():  # torch fails to put such shards together
        return local.new_empty(tensor.shape)
    # One more dimension, which is not sharded, holds the bytes of each element. So rows that do not divide evenly among
    # the ranks are divided as they were.
    bytes_of = local.unsqueeze(-1).view(torch.uint8)
    shape = torch.Size((*tensor.shape, bytes_of.shape[-1]))
    stride = torch.empty(shape, device="meta").stride()
    as_bytes = DTensor.from_local(  # moves them to the device of the mesh
        bytes_of, tensor.device_mesh, tensor.placements, run_check=False, shape=shape, stride=stride
    )
    return as_bytes.full_tensor().contiguous().view(tensor.dtype).squeeze(-1).to(local.device)

"""The values of a tensor as they lie: bytes for files, digests and transfers, and copies of all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from keepbest.modules.device_memory import unless_full


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a dense tensor, in order, as one row of bytes: the same memory where they lie side by side."""
    whole = signed(tensor).contiguous()
    # Not reshape(-1): a tensor of one element is contiguous with any stride, and would keep it.
    return whole.as_strided((whole.numel(),), (1,)).view(torch.uint8)


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a dense tensor on the CPU, which takes no memory on its device.

    Where elements do not lie side by side, torch would first copy them there. So this copies what lies between, too.
    """
    if not tensor.numel():
        return tensor.detach().to("cpu", copy=True)
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    found = unsigned(tensor).as_strided((length,), (1,)).to("cpu", copy=True)
    found = found.as_strided(tensor.shape, tensor.stride())
    found = found.conj() if tensor.is_conj() else found
    return found.neg() if tensor.is_neg() else found


def copy_to_host(room: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a dense tensor into a room on the CPU, with its signs, and wait for it."""
    # torch puts the elements in order on the device, and their signs there.
    unless_full(lambda: room.copy_(signed(value)), lambda: room.copy_(on_host(value)))


def brought_to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor on the CPU, with its signs in memory: itself if it is there and has them."""
    return unless_full(lambda: signed(tensor).cpu(), lambda: signed(on_host(tensor)))


def joined_on_host(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors of one device one after the other, on the CPU. They come at once: each copy waits for the device."""
    return unless_full(lambda: torch.cat(list(rows)).cpu(), lambda: torch.cat([row.cpu() for row in rows]))


def unsigned(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor has in memory. torch would give a view its signs in a copy on the device."""
    if not (tensor.is_conj() or tensor.is_neg()):
        return tensor.detach()
    stored = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return stored.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def signed(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a tensor, with their signs in memory: those of a conjugated or negated view are put there.

    torch must not copy such a view from a CUDA device: where elements do not lie side by side, it changes signs twice.
    """
    return tensor.detach().resolve_conj().resolve_neg()


def buffer_of(tensor: torch.Tensor) -> memoryview:
    """What `raw_bytes` gives of a tensor on the CPU, to be read by what does not know torch."""
    # Not numpy(): torch never resizes the storage again after it, and it may be that of the model.
    return np.from_dlpack(raw_bytes(tensor)).data

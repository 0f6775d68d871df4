"""Tests for torch's wrappers and sharded tensors that do not import their modules, which takes half a second.

If nothing has imported such a module, no object of it can exist.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import nn
from torch.nn.parameter import is_lazy

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

PLAIN_CLASSES = (torch.Tensor, nn.Parameter, nn.Buffer)  # all others may behave in their own way


def is_fsdp1(module: object) -> TypeGuard[FullyShardedDataParallel]:
    """Whether `module` is wrapped by `FullyShardedDataParallel`."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)


def is_fsdp2(module: object) -> TypeGuard[FSDPModule]:
    """Whether `fully_shard` was applied to `module`."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def is_activation_wrapper(module: object) -> bool:
    """Whether `module` wraps another one for activation checkpointing or offloading."""
    wrappers = sys.modules.get("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    return wrappers is not None and isinstance(module, wrappers.ActivationWrapper)


def is_compiled(module: object) -> bool:
    """Whether `module` is what `torch.compile` made of another one."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    """Whether `value` is a `DTensor`, as used by FSDP2 and tensor parallelism."""
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(value, tensor.DTensor)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor: of a DTensor its shard."""
    return tensor.to_local().detach() if is_dtensor(tensor) else tensor


def has_shards(value: object) -> bool:
    """Whether `value` is a tensor of which each rank holds a part."""
    if type(value) in PLAIN_CLASSES:
        return False
    return is_dtensor(value) or hasattr(value, "local_shards")  # the tensors of FSDP1 have those


def is_dense(value: object) -> TypeGuard[torch.Tensor]:
    """Whether `value` is a tensor whose elements lie one after the other in memory."""
    return isinstance(value, torch.Tensor) and not form_of(value)


def lacks_memory(tensor: torch.Tensor) -> bool:
    """Whether the storage of a dense tensor is too small for its elements, as after its memory was freed."""
    if type(tensor) not in PLAIN_CLASSES or tensor.layout != torch.strided or not tensor.numel():
        return False
    if tensor.is_contiguous():
        last = tensor.numel() - 1
    else:
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (tensor.storage_offset() + last + 1) * tensor.element_size() > tensor.untyped_storage().nbytes()


def has_shared_elements(tensor: torch.Tensor) -> bool:
    """Whether torch refuses to write into a tensor: one that was made by `expand`."""
    if tensor.layout != torch.strided or not tensor.numel():
        return False
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def is_fake(value: object) -> bool:
    """Whether a tensor has a shape and no values, as one that was made under `FakeTensorMode`."""
    return isinstance(value, torch.Tensor) and type(value).__name__ == "FakeTensor"


def kind_of_new() -> str | None:
    """The class of new tensors where a mode of torch is on in which they are no plain ones, and may lack values."""
    kind = type(torch.empty(0, device="cpu"))
    return None if kind in PLAIN_CLASSES else kind.__name__


def form_of(tensor: torch.Tensor) -> str:
    """Layout and class of a tensor, as far as they are not those of a dense one, which may be sharded, or to come."""
    is_plain = type(tensor) in PLAIN_CLASSES and tensor.layout == torch.strided
    if (is_plain and not (tensor.is_quantized or tensor.is_meta)) or has_shards(tensor) or is_lazy(tensor):
        return ""
    words = []
    if tensor.layout != torch.strided:
        words.append(str(tensor.layout).removeprefix("torch."))
        if tensor.layout != torch.sparse_coo:  # of the others torch copies only into those with as many elements
            words.append(f"with {len(tensor.values())} elements")
    if tensor.is_quantized:
        words.append(str(tensor.qscheme()).removeprefix("torch."))
    if tensor.is_meta:
        words.append("meta")
    # Others have the values of a dense tensor, and are one where they are copied.
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        words.append(type(tensor).__name__)
    return " ".join(words)

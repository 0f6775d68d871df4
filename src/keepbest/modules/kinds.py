"""Tests for torch's wrappers and sharded tensors that do not import their modules, which takes half a second.

If nothing has imported such a module, no object of it can exist.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

if TYPE_CHECKING:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor


def is_fsdp1(module: object) -> TypeGuard[FullyShardedDataParallel]:
    """Whether `module` is wrapped by `FullyShardedDataParallel`."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)


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


def has_shards(value: object) -> bool:
    """Whether `value` is a tensor of which each rank holds a part."""
    return is_dtensor(value) or hasattr(value, "local_shards")  # the tensors of FSDP1 have those

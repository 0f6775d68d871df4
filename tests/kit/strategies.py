"""Every way that a user may wrap a model, and what torch itself says that it then holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from keepbest.models import CompositeModel
from tests.kit.models import bare, flat, nested, odd, odd_bf16, scalar

Wrap = Callable[[nn.Module], nn.Module]
CPU = torch.device("cpu")


def whole_weights(model: nn.Module) -> list[Tensor]:
    """This rank's own view of every parameter and buffer, in order, put together by torch. Collective."""
    holds_fsdp1 = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    with FullyShardedDataParallel.summon_full_params(model, writeback=False) if holds_fsdp1 else nullcontext():
        tensors = [*model.parameters(), *(tensor for name, tensor in model.named_buffers() if "scratch" not in name)]
        return [(t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for t in tensors]


def blocks(model: nn.Module) -> list[str]:
    """Paths of the submodules that are wrapped one by one: of a composite its submodels, the innermost first."""
    if isinstance(model, CompositeModel):
        paths = []
        for name, submodel in model.submodels.items():
            if isinstance(submodel, CompositeModel):
                paths += [f"{name}.{inner}" for inner in blocks(submodel)]
            paths.append(name)
        return paths
    return ["module", "tied"]


def replace_blocks(model: nn.Module, wrap: Wrap) -> nn.Module:
    for path in blocks(model):
        model.set_submodule(path, wrap(model.get_submodule(path)))
    return model


def replace_leaves(model: nn.Module, wrap: Wrap) -> nn.Module:
    paths = blocks(model)
    for path in paths:
        if not any(other.startswith(f"{path}.") for other in paths):
            model.set_submodule(path, wrap(model.get_submodule(path)))
    return model


def single(model: nn.Module) -> nn.Module:
    return model


def ddp(model: nn.Module) -> nn.Module:
    wrapped = DistributedDataParallel(model)
    if dist.get_rank() > 0:  # as after some steps of training: what DDP keeps equal are the parameters
        with torch.no_grad():
            for buffer in wrapped.buffers():
                buffer.add_(dist.get_rank())
    return wrapped


def ddp_blocks(model: nn.Module) -> nn.Module:
    def wrap(block):
        return DistributedDataParallel(block) if any(p.requires_grad for p in block.parameters()) else block

    return replace_leaves(model, wrap)


def fsdp1(module: nn.Module, *, use_orig_params: bool = True) -> nn.Module:
    return FullyShardedDataParallel(module, device_id=CPU, use_orig_params=use_orig_params)


def fsdp1_flat(model: nn.Module) -> nn.Module:
    return fsdp1(model, use_orig_params=False)


def fsdp1_blocks(model: nn.Module) -> nn.Module:
    return replace_leaves(model, fsdp1)


def fsdp1_flat_blocks(model: nn.Module) -> nn.Module:
    return replace_leaves(model, fsdp1_flat)


def fsdp1_nested(model: nn.Module) -> nn.Module:
    return fsdp1(replace_blocks(model, fsdp1))


def fsdp1_flat_nested(model: nn.Module) -> nn.Module:
    return fsdp1_flat(replace_blocks(model, fsdp1_flat))


def fsdp2(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def fsdp2_blocks(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for path in blocks(model):
        fully_shard(model.get_submodule(path), mesh=mesh)
    return model


def fsdp2_nested(model: nn.Module) -> nn.Module:
    return fully_shard(fsdp2_blocks(model), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def fsdp2_replicated(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    return fully_shard(model, mesh=mesh)


def tensor_parallel(model: nn.Module) -> nn.Module:
    return parallelized(model, init_device_mesh("cpu", (dist.get_world_size(),)))


def tensor_parallel_fsdp2(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    return fully_shard(parallelized(model, mesh["tensor"]), mesh=mesh["data"])


def parallelized(model: nn.Module, mesh: Any) -> nn.Module:
    plans = {
        path: ColwiseParallel() if number % 2 == 0 else RowwiseParallel()
        for number, (path, module) in enumerate(model.named_modules())
        if isinstance(module, nn.Linear) and not path.endswith(("first", "second"))
    }
    return parallelize_module(model, mesh, plans)


FAMILIES: dict[str, dict[str, Wrap]] = {
    "replicated": {"single": single, "ddp": ddp, "ddp_blocks": ddp_blocks},
    "fsdp1": {"fsdp1": fsdp1, "fsdp1_blocks": fsdp1_blocks, "fsdp1_nested": fsdp1_nested},
    "fsdp1_flat": {
        "fsdp1_flat": fsdp1_flat, "fsdp1_flat_blocks": fsdp1_flat_blocks, "fsdp1_flat_nested": fsdp1_flat_nested,
    },
    "fsdp2": {"fsdp2": fsdp2, "fsdp2_blocks": fsdp2_blocks, "fsdp2_nested": fsdp2_nested},
    "mesh": {
        "tensor_parallel": tensor_parallel, "tensor_parallel_fsdp2": tensor_parallel_fsdp2,
        "fsdp2_replicated": fsdp2_replicated,
    },
}  # fmt: skip
WRAPS = {name: wrap for family in FAMILIES.values() for name, wrap in family.items()}


def fits(wrap: str, world_size: int) -> bool:
    """Whether the strategy is one for so many ranks."""
    if wrap in ("tensor_parallel_fsdp2", "fsdp2_replicated"):
        return world_size == 4
    return wrap != "single" or world_size == 1


def models_for(wrap: str) -> list[Callable[[int], nn.Module]]:
    """The models that torch takes in this strategy."""
    if wrap in ("fsdp1", "fsdp1_flat", "fsdp1_flat_nested"):  # one dtype, or one answer to requires_grad, per unit
        return [odd, odd_bf16, flat, bare]
    models = [odd, odd_bf16, nested]
    return [*models, scalar] if wrap in ("single", "ddp", "tensor_parallel") else models


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def checkpointed(module: nn.Module) -> nn.Module:
    apply_activation_checkpointing(module, check_fn=is_linear)
    return module


def variants(wrap: Wrap, *, few: bool = False) -> Iterator[tuple[str, Wrap]]:
    """A strategy alone, and together with what else stands in the names of a state dict."""
    yield "alone", wrap
    yield "compiled, checkpointed", lambda model: compiled(checkpointed(wrap(model)))
    if few:
        return
    yield "compiled", lambda model: compiled(wrap(model))
    yield "checkpointed", lambda model: checkpointed(wrap(model))
    yield "checkpointed before", lambda model: wrap(checkpointed(model))
    yield "compiled blocks", lambda model: wrap(replace_leaves(model, compiled))

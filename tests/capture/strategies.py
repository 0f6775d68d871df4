"""Models with odd weights, every way that a user may wrap them, and what torch itself says that they hold."""

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

Wrap = Callable[[nn.Module], nn.Module]
CPU = torch.device("cpu")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, batch):
        return self.second(self.first(batch))


class Odd(nn.Module):
    """Odd shapes, a parameter that is smaller than the number of ranks, tied ones, buffers, and a child `module`."""

    def __init__(self, width: int = 5):
        super().__init__()
        self.module = nn.Linear(width, 7)
        self.norm = nn.BatchNorm1d(7)
        self.down = nn.Linear(7, width)
        self.tied = Tied()
        self.one = nn.Parameter(torch.zeros(1))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


class Scalar(Odd):
    """Odd, with a parameter of no dimensions and one of no elements, which FSDP does not take."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.zeros(()))
        self.empty = nn.Parameter(torch.zeros(0, 3))


class Composite(CompositeModel):
    """With a parameter of its own, outside of its submodels."""

    def __init__(self, submodels):
        super().__init__(submodels)
        self.scale = nn.Parameter(torch.zeros(3))

    def forward(self, batch):
        raise NotImplementedError

    def losses(self, outputs, batch):
        raise NotImplementedError


class Bare(Composite):
    """Without one."""

    def __init__(self, submodels):
        super().__init__(submodels)
        del self.scale


def filled(model: nn.Module, seed: int) -> nn.Module:
    """`model` with weights of `seed`, among them values that only a comparison of bits tells apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(generator=generator)
            else:
                tensor.random_(0, 1000, generator=generator)
        largest = max(model.parameters(), key=lambda parameter: parameter.numel()).view(-1)
        largest[:4] = torch.tensor([-0.0, torch.nan, torch.inf, 1e-41], dtype=largest.dtype)
    return model


def odd(seed: int = 0) -> nn.Module:
    return filled(Odd(), seed)


def odd_bf16(seed: int = 0) -> nn.Module:
    return filled(Odd().bfloat16(), seed)


def scalar(seed: int = 0) -> nn.Module:
    return filled(Scalar(), seed)


def nested(seed: int = 0) -> nn.Module:
    """A composite in a composite, with a part in bf16 and a frozen part."""
    inner = Bare({"encoder": Odd(), "decoder": nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 1)).bfloat16()})
    model = Composite({"autoencoder": inner, "head": nn.Linear(5, 7)})
    model.head.requires_grad_(False)
    return filled(model, seed)


def flat(seed: int = 0, kind: type[CompositeModel] = Composite) -> nn.Module:
    """A composite of one dtype that trains as a whole, for strategies that want one flat parameter."""
    return filled(kind({"encoder": Odd(), "decoder": nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 1))}), seed)


def bare(seed: int = 0) -> nn.Module:
    return flat(seed, Bare)


def expected_files(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """What a snapshot of the unwrapped `model` must hold: part -> the state dict that torch makes of it."""
    if isinstance(model, Odd):
        return {"model": clone(model.state_dict())}
    names = ["encoder", "decoder"]
    if hasattr(model, "autoencoder"):
        names = ["autoencoder.encoder", "autoencoder.decoder", "head"]
    files = {name: clone(model.get_submodule(name).state_dict()) for name in names}
    return {**files, "model": clone({"scale": model.scale})} if hasattr(model, "scale") else files


def clone(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in state.items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether two state dicts have the same keys, shapes, dtypes and bits."""
    return found.keys() == expected.keys() and all(same_bits(found[key], value) for key, value in expected.items())


def same_bits(found: Tensor, expected: Tensor) -> bool:
    return (
        type(found) in (Tensor, nn.Parameter)
        and found.device == expected.device
        and found.dtype == expected.dtype
        and found.shape == expected.shape
        and torch.equal(*(tensor.detach().reshape(-1).view(torch.uint8) for tensor in (found, expected)))
    )


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

"""Every layout x format x number of ranks: kept, and loaded bit for bit into the same layout, and into others."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from keepbest import BestKeeper, load
from keepbest.capture.whole import whole_tensor
from tests.kit.models import filled, same_bits
from tests.kit.pool import run_ranks
from tests.kit.runs import update
from tests.kit.strategies import CPU, parallelized, whole_weights

REF = "best_model.loss"
DTYPES = (
    torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8,
    torch.int16, torch.uint16, torch.int32, torch.int64, torch.bool, torch.complex64,
)  # fmt: skip


class Block(nn.Module):
    """Uneven dimensions, experts and buffers."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(5, 7)
        self.down = nn.Linear(7, 5)
        self.norm = nn.BatchNorm1d(5)
        self.experts = nn.Parameter(torch.zeros(5, 3, 2))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


def block(seed):
    return filled(Block(), seed)


class Rows(nn.Module):
    """Layers that are sharded by rows, whose numbers of rows cannot be divided twice by two."""

    def __init__(self):
        super().__init__()
        # Every second module is sharded by columns.
        self.layers = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4098))


def rows(seed):
    return filled(Rows(), seed)


def odd(seed):
    """A block with parameters of every dtype, which do not train."""
    model, generator = block(seed), torch.Generator().manual_seed(seed)
    for dtype in DTYPES:
        drawn = torch.randint(0, 100, (6, 5), generator=generator)
        values = drawn > 50 if dtype == torch.bool else drawn.to(dtype)
        model.register_parameter(str(dtype).replace("torch.", "of_"), nn.Parameter(values, requires_grad=False))
    return model


def single(model):
    return model


def ddp(model):
    return DistributedDataParallel(model)


def world():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def square():
    return init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))


def fsdp2(model):
    return fully_shard(model, mesh=world())


def fsdp2_inner(model):
    """Each parameter is sharded along its innermost dimension that can be divided, which FSDP2 demands of all but 0."""

    def innermost(parameter):
        dims = range(parameter.dim() - 1, 0, -1)
        return next((Shard(dim) for dim in dims if parameter.shape[dim] % dist.get_world_size() == 0), Shard(0))

    return fully_shard(model, mesh=world(), shard_placement_fn=innermost)


def hsdp(model):
    return fully_shard(model, mesh=square())


def tensor_parallel(model):
    return parallelized(model, world())


def tensor_parallel_fsdp2(model):
    mesh = square()
    return fully_shard(parallelized(model, mesh["shard"]), mesh=mesh["replicate"])


def sharded_by(mesh, *placements):
    def wrap(model):
        for name, parameter in list(model.named_parameters()):
            if "." not in name and parameter.dim() > 1:
                sharded = nn.Parameter(
                    distribute_tensor(parameter.data, mesh(), list(placements), src_data_rank=None),
                    requires_grad=parameter.requires_grad,
                )
                setattr(model, name, sharded)
        return model

    return wrap


def experts_fsdp2(model):
    """Experts as DTensors over all ranks, the rest by FSDP2."""
    model = sharded_by(world, Shard(0))(model)
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=world())
    return model


def mixed(model):
    """One layer is sharded, the others are plain."""
    fully_shard(model.up, mesh=world())
    return model


def fsdp2_ignoring(model):
    return fully_shard(model, mesh=world(), ignored_params={*model.down.parameters()})


def fsdp1_ignoring(model):
    return FullyShardedDataParallel(model, device_id=CPU, ignored_modules=[model.down], use_orig_params=True)


def fsdp1_hybrid(model):
    mesh = square()
    return FullyShardedDataParallel(
        model, device_id=CPU, process_group=(mesh.get_group("shard"), mesh.get_group("replicate")),
        sharding_strategy=ShardingStrategy.HYBRID_SHARD, use_orig_params=True,
    )  # fmt: skip


def fsdp1_no_shard(model):
    return FullyShardedDataParallel(model, device_id=CPU, sharding_strategy=ShardingStrategy.NO_SHARD)


def fsdp1_columns(model):
    """One unit in another, with weights that lie in memory column by column, as those of channels_last do."""
    for layer in (model.up, model.down):
        layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    model.down = FullyShardedDataParallel(model.down, device_id=CPU, use_orig_params=True)
    return FullyShardedDataParallel(model, device_id=CPU, use_orig_params=True)


# FSDP2 takes integers since torch 2.12.
SHARDED_BY_FSDP2 = (block, odd) if torch.__version__ >= "2.12" else (block,)
# layout -> how to wrap, the numbers of ranks, the models
LAYOUTS = {
    "single": (single, (1,), (block, odd)),
    "ddp": (ddp, (1, 2, 3, 4), (block,)),  # gloo broadcasts few dtypes
    "fsdp2": (fsdp2, (1, 2, 3, 4), SHARDED_BY_FSDP2),
    "fsdp2_inner": (fsdp2_inner, (2, 3), (block,)),
    "hsdp": (hsdp, (2, 4), (*SHARDED_BY_FSDP2, rows)),
    "tensor_parallel": (tensor_parallel, (2, 3, 4), (block,)),
    "tensor_parallel_fsdp2": (tensor_parallel_fsdp2, (4,), (block, rows)),
    "columns": (sharded_by(world, Shard(1)), (2, 3, 4), (odd,)),
    "experts": (sharded_by(world, Shard(0)), (2, 3), (odd,)),
    "experts_fsdp2": (experts_fsdp2, (2, 3, 4), (block,)),
    "mixed": (mixed, (2, 3), (block,)),
    "fsdp2_ignoring": (fsdp2_ignoring, (2, 3), (block,)),
    "fsdp1_ignoring": (fsdp1_ignoring, (2, 3), (block,)),
    "fsdp1_hybrid": (fsdp1_hybrid, (4,), (block,)),
    "fsdp1_no_shard": (fsdp1_no_shard, (2,), (block,)),
    "fsdp1_columns": (fsdp1_columns, (2, 3), (block,)),
}
ROWS = [(size, file_format) for size in (1, 2, 3, 4) for file_format in ("torch", "safetensors", "dcp")]


def whole(model):
    """As `whole_weights`, also of dtypes that gloo does not know."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return whole_weights(model)
    return [
        whole_tensor(tensor) if isinstance(tensor, DTensor) else tensor
        for tensor in (*model.parameters(), *model.buffers())
    ]


def are_same(found, expected):
    return len(found) == len(expected) and all(map(same_bits, found, expected))


def keep_every_layout(directory, file_format):
    """What went wrong, for all layouts that so many ranks can have; they share the ranks, which cost the most."""
    size = dist.get_world_size()
    names = [name for name, (_, sizes, _) in LAYOUTS.items() if size in sizes]
    for number, name in enumerate(names):
        wrap, _, makes = LAYOUTS[name]
        if (name, file_format) == ("fsdp1_hybrid", "dcp"):
            continue  # it is refused
        for make in makes:
            run = directory / f"{name}-{make.__name__}"
            with BestKeeper(wrap(make(0)), directory=run, metric_key="loss", format=file_format) as keeper:
                keeper.observe(1.0, update(1))
            wanted = whole(make(0))
            after = [LAYOUTS[names[(number + step) % len(names)]] for step in range(1, len(names) + 1)]
            other = next(wrap for wrap, _, takes in after if make in takes)
            for target in (wrap, single, other):
                load(run, REF, model := target(make(1)))
                if not are_same(whole(model), wanted):
                    yield name, make.__name__, target


def faults_of_layouts(directory, file_format):
    return [(name, make, str(target)) for name, make, target in keep_every_layout(directory, file_format)]


def load_alone(directory):
    """What a single process makes of all that was kept."""
    found = []
    for run in sorted(directory.iterdir()):
        make = {"block": block, "odd": odd, "rows": rows}[run.name.partition("-")[2]]
        load(run, REF, model := make(1))
        if not are_same(whole(model), whole(make(0))):
            found.append(run.name)
    return found


@pytest.mark.parametrize(("world_size", "file_format"), ROWS)
def test_layout_is_kept_and_loaded_bit_for_bit(world_size, file_format, tmp_path):
    assert run_ranks(faults_of_layouts, world_size, tmp_path, file_format) == [[]] * world_size
    kept = {
        (name, make.__name__) for name, (_, sizes, makes) in LAYOUTS.items() for make in makes if world_size in sizes
    }
    assert {tuple(run.name.split("-")) for run in tmp_path.iterdir()} >= kept - {("fsdp1_hybrid", "block")}
    assert load_alone(tmp_path) == []

"""One of two ranks that share one device: runs every check of one process group, and reports each.

    RANK=0 WORLD_SIZE=2 python -m tests.cuda.rank_checks nccl FOLDER    # those named in FOLDER/names

NCCL takes two ranks on one device if each believes to be a host of its own, which `tests/cuda/test_ranks.py` arranges.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from keepbest import BestKeeper, load
from keepbest.errors import RankFailedError
from tests.cuda.device import DEVICE, MIB, ON_CUDA, alter, assert_same, copied, finish, keeper_of, zero

REF = "best_model.loss"
WORLD = 2
GROUPS = {"nccl": "nccl", "both": "cpu:gloo,cuda:nccl"} if ON_CUDA else {"nccl": "gloo", "both": "gloo"}
Wrap = Callable[[nn.Module], nn.Module]


class Layers(nn.Module):
    """Uneven rows, a shard that is empty on the second rank, bf16, a scalar buffer, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.even = nn.Linear(8, 6)
        self.uneven = nn.Linear(5, 7)
        self.single = nn.Linear(3, 1)
        self.bf16 = nn.Linear(16, 9, dtype=torch.bfloat16)
        self.norm = nn.BatchNorm1d(4)
        self.tied = nn.Linear(8, 6, bias=False)
        self.tied.weight = self.even.weight


class Plain(nn.Module):
    """One dtype and nothing tied, as FSDP1 wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 7)
        self.second = nn.Linear(7, 3)


def mesh(*shape: int) -> object:
    names = ("replicate", "shard")[-len(shape) :]
    return init_device_mesh(DEVICE.type, shape, mesh_dim_names=names)


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp1(model: nn.Module) -> nn.Module:
    model.first = wrapped(model.first)
    return wrapped(model)


def wrapped(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=DEVICE, use_orig_params=True)


def fsdp2(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=mesh(WORLD))


def nested(model: nn.Module) -> nn.Module:
    over = mesh(WORLD)
    for layer in (model.uneven, model.bf16):
        fully_shard(layer, mesh=over)
    return fully_shard(model, mesh=over)


def several_meshes(model: nn.Module) -> nn.Module:
    for layer in (model.uneven, model.single, model.bf16):
        fully_shard(layer, mesh=mesh(WORLD))
    return model


def hybrid(model: nn.Module, shape: tuple[int, int]) -> nn.Module:
    return fully_shard(model, mesh=mesh(*shape))


def offloaded(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=mesh(WORLD), offload_policy=CPUOffloadPolicy(pin_memory=ON_CUDA))


def offloaded_columns(model: nn.Module) -> nn.Module:
    """Shards on the CPU some of which are no rows, so that they are made whole on each rank."""

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(1 if parameter.dim() > 1 and parameter.shape[1] % WORLD == 0 else 0)

    policy = CPUOffloadPolicy(pin_memory=ON_CUDA)
    return fully_shard(model, mesh=mesh(WORLD), offload_policy=policy, shard_placement_fn=placement)


def partly_on_cpu(model: nn.Module) -> nn.Module:
    model.single.to("cpu")
    for layer in (model.uneven, model.bf16):
        fully_shard(layer, mesh=mesh(WORLD))
    return model


WRAPS: dict[str, tuple[type[nn.Module], Wrap]] = {
    "ddp": (Layers, ddp),
    "fsdp1": (Plain, fsdp1),
    "fsdp2": (Layers, fsdp2),
    "fsdp2_nested": (Layers, nested),
    "several_meshes": (Layers, several_meshes),
    "hybrid_2_1": (Layers, partial(hybrid, shape=(2, 1))),
    "hybrid_1_2": (Layers, partial(hybrid, shape=(1, 2))),
    "cpu_offload": (Layers, offloaded),
    "cpu_offload_columns": (Layers, offloaded_columns),
    "partly_on_cpu": (Layers, partly_on_cpu),
}


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().to(DEVICE)


def change_shards(model: nn.Module) -> None:
    """Gives every weight another value, in place, on each rank. Collective for none."""
    with torch.no_grad():
        for value in dict.fromkeys([*model.parameters(), *model.buffers()]):
            alter(local(value))


def local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def shards(model: nn.Module) -> dict[str, Tensor]:
    finish()
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: local(value).detach().to("cpu", copy=True) for name, value in named}


def check_bits(folder: Path, wrap: str, file_format: str, *, async_save: bool) -> None:
    """Two bests, loaded into a model on each rank that is not wrapped, and back into the wrapped one."""
    kind, function = WRAPS[wrap]
    plain = made(kind)
    expected = [copied(plain)]
    change_shards(plain)
    expected.append(copied(plain))
    model = function(made(kind))
    mine = []
    with BestKeeper(
        model, directory=folder, metric_key="loss", format=file_format, async_save=async_save, keep_top_k=2
    ) as keeper:
        for epoch in (1, 2):
            mine.append(shards(model))
            keeper.observe(-float(epoch), epoch=epoch)
            change_shards(model)
            keeper.flush()
    for ref, number in ((REF, 1), (f"{REF}.top=2", 0)):
        load(folder, ref, zero(plain))
        assert_same(copied(plain), expected[number])
        load(folder, ref, model)
        assert_same(shards(model), mine[number])


def check_training_state(folder: Path, wrap: str, file_format: str, *, async_save: bool) -> None:
    kind, function = WRAPS[wrap]
    model = function(made(kind))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    step()
    with keeper_of(model, folder, file_format, async_save, training_state={"optimizer": optimizer}) as keeper:
        keeper.observe(1.0, epoch=1)
        weights, states = shards(model), optimizer_states(optimizer)
        step()
        after = shards(model)
    load(folder, REF, model, training_state={"optimizer": optimizer})
    assert_same(shards(model), weights)
    if wrap != "fsdp1":  # which has states of empty shards before the load alone
        assert_same(optimizer_states(optimizer), states)
    step()
    assert_same(shards(model), after)


def optimizer_states(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    finish()
    found = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": local(value).to("cpu", copy=True)
        for number, each in found.items()
        for name, value in each.items()
    }


def check_memory(folder: Path, file_format: str, *, async_save: bool) -> str:
    """A rank that does not write needs no more than one bucket, although a parameter has twice as much.

    Returns:
        What this rank needed, in words.
    """
    torch.manual_seed(0)
    big = nn.Sequential(*(nn.Linear(4096, 8192, bias=False, device=DEVICE) for _ in range(2)))  # 128 MiB each
    expected = copied(big)
    model = fully_shard(big, mesh=mesh(WORLD))
    with BestKeeper(model, directory=folder, metric_key="loss", format=file_format, async_save=async_save) as keeper:
        gc.collect()  # what the check before left in cycles would be freed while this one counts memory
        if ON_CUDA:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if ON_CUDA else 0
        keeper.observe(1.0, epoch=1)
        change_shards(model)
        keeper.flush()
        grown = torch.cuda.max_memory_allocated() - before if ON_CUDA else 0
        left = torch.cuda.memory_allocated() - before if ON_CUDA else 0
    plain = nn.Sequential(*(nn.Linear(4096, 8192, bias=False) for _ in range(2)))
    load(folder, REF, zero(plain))
    assert_same(copied(plain), expected)
    assert left <= 2 * MIB, f"{left / MIB:.1f} MiB are still in use"
    if dist.get_rank() == 1:
        assert grown <= 66 * MIB, f"rank 1 needed {grown / MIB:.1f} MiB more"
    return f"{grown / MIB:.1f} MiB more at most, {left / MIB:.1f} MiB left"


def check_share_of_zero(folder: Path) -> None:
    """Without memory for copies of the weights, sharded ones are kept right too."""
    plain = made(Layers)
    expected = copied(plain)
    for file_format in ("torch", "dcp"):
        model = nested(made(Layers))
        run = folder / file_format
        settings = {"staging_device_share": 0.0} if ON_CUDA else {}
        with BestKeeper(
            model, directory=run, metric_key="loss", format=file_format, async_save=True, **settings
        ) as keeper:
            keeper.observe(1.0, epoch=1)
            change_shards(model)
        load(run, REF, zero(plain))
        assert_same(copied(plain), expected)


@contextmanager
def limited() -> Iterator[None]:
    """torch takes hardly more memory from the device in this process than it has now: 2 MiB for small tensors."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 3 * MIB) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def check_full_device(folder: Path) -> str:
    """Rank 0 makes do with the memory that torch has for small tensors. Without it both ranks raise one error.

    Returns:
        What this rank needed, in words.
    """
    torch.manual_seed(0)
    big = nn.Linear(4096, 4096, bias=False, device=DEVICE)  # 64 MiB
    expected, error = copied(big), ""
    model = fully_shard(big, mesh=mesh(WORLD))
    taken = []
    is_limited = ON_CUDA and dist.get_rank() == 0
    with BestKeeper(model, directory=folder, metric_key="loss") as keeper, limited() if is_limited else nullcontext():
        if ON_CUDA:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if ON_CUDA else 0
        keeper.observe(2.0, epoch=1)
        grown = torch.cuda.max_memory_allocated() - before if ON_CUDA else 0
        if is_limited:
            with suppress(torch.OutOfMemoryError):
                while True:
                    taken.append(torch.empty(1 << 14, device=DEVICE))
        try:
            keeper.observe(1.0, epoch=2)
        except RankFailedError as raised:
            error = str(raised)
        taken.clear()
    load(folder, REF, zero(plain := nn.Linear(4096, 4096, bias=False)))
    assert_same(copied(plain), expected)
    assert ("on rank 0 of 2: RankFailedError: there is no memory for two buckets" in error) == ON_CUDA, error
    assert grown <= 32 * MIB, f"{grown / MIB:.1f} MiB more were needed, and 64 are without a limit"
    return f"{grown / MIB:.1f} MiB more at most"


def checks() -> Iterator[tuple[str, Callable[[Path], str | None]]]:
    """Each check by its name. It returns what is to be reported although it passed, if anything."""
    ways = [(form, is_async) for form in ("torch", "dcp") for is_async in (False, True)]
    for form, is_async in ways:
        how = f"{form}-{'async' if is_async else 'sync'}"
        for wrap in WRAPS:
            yield f"bits-{wrap}-{how}", partial(check_bits, wrap=wrap, file_format=form, async_save=is_async)
        for wrap in ("ddp", "fsdp1", "fsdp2", "cpu_offload"):
            check = partial(check_training_state, wrap=wrap, file_format=form, async_save=is_async)
            yield f"training_state-{wrap}-{how}", check
    for is_async in (False, True):
        check = partial(check_memory, file_format="torch", async_save=is_async)
        yield f"memory-{'async' if is_async else 'sync'}", check
    yield "share_of_zero", check_share_of_zero
    yield "full_device", check_full_device


NAMES = [name for name, _ in checks()]


def main(group: str, folder: Path) -> None:
    rank = int(os.environ["RANK"])
    if ON_CUDA:
        torch.cuda.set_device(0)
    dist.init_process_group(
        GROUPS[group],
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=15),
        device_id=torch.device("cuda", 0) if ON_CUDA and group == "nccl" else None,
    )
    chosen = (folder / "names").read_text().splitlines()
    meeting = dist.FileStore(str(folder / "meeting"), WORLD)
    meeting.set_timeout(timedelta(seconds=20))
    with (folder / f"rank{rank}.jsonl").open("w") as report:
        for name, check in ((name, check) for name, check in checks() if name in chosen):
            started, error, figures = time.monotonic(), "", None
            try:
                figures = check(folder / "runs" / name)
            except Exception:  # noqa: BLE001  # each check is reported, and the next one follows
                error = traceback.format_exc()
            seconds = round(time.monotonic() - started, 2)
            report.write(json.dumps({"name": name, "seconds": seconds, "error": error, "figures": figures}) + "\n")
            report.flush()
            print(f"{name}: {'failed' if error else 'passed'} in {seconds} s\n{error}", flush=True)
            # Not a collective: a rank that fails in the middle of one is not where the other is.
            meeting.set(f"{name}/{rank}", "failed" if error else "passed")
            if error or meeting.get(f"{name}/{1 - rank}") == b"failed":
                # keepbest runs no more collectives in these processes. The remaining checks get new ones.
                meeting.wait([f"{name}/{1 - rank}"])
                os._exit(0)  # torch may wait for the other rank, to leave the group
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

"""How much memory does a save take beyond the model's own?

The kernel keeps the highest resident size of a process; it is set back before the first save and read after the last.
"""

from __future__ import annotations

import gc
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from benchmarks import measure
from benchmarks.contestants import Keepbest
from benchmarks.measure import Line, Report, Size, resident, shard

BUFFERS = 2
STRATEGIES = ("DDP", "FSDP2", "FSDP1")


def wrap(model: nn.Sequential, strategy: str) -> nn.Module:
    if strategy == "DDP":
        return DistributedDataParallel(model)
    if strategy == "FSDP2":
        return shard(model, dist.get_world_size())
    device = torch.device("cpu")
    units = [FullyShardedDataParallel(block, device_id=device, use_orig_params=True) for block in model]
    return FullyShardedDataParallel(nn.Sequential(*units), device_id=device, use_orig_params=True)


def measure_on_rank(strategy: str, folder: Path, size: Size, is_async: bool) -> tuple[int, int, int]:
    """Bytes above the model's own at the worst moment of the saves; bytes that are saved; bytes of the largest part."""
    plain = measure.make_model(size.megabytes)
    saved = measure.weight_bytes(plain)
    largest = max(value.numel() * value.element_size() for value in plain.parameters())
    if strategy == "FSDP1":
        largest = max(measure.weight_bytes(block) for block in plain)
    model = wrap(plain, strategy)
    del plain
    keeper = Keepbest(model, folder, **({"async_save": True} if is_async else {}))
    measure.meet()
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest
    for _ in range(size.repetitions):  # without waiting in between, so that all buffers are in use
        keeper.act()
    keeper.settle()
    above = resident("VmHWM") - before
    keeper.end()
    return above, saved, largest


def run(quick: bool) -> Report:
    size = Size(64, 3) if quick else Size(1000, 5)
    report = Report()
    for strategy in STRATEGIES[:1] if quick else STRATEGIES:
        for is_async in (False, True):
            with measure.scratch() as folder:
                ranks = measure.on_ranks(2, measure_on_rank, strategy, folder, size, is_async)
            how = "async" if is_async else "sync"
            (main, saved, largest), (other, _, _) = ranks
            report.samples[f"{strategy}, {how}"] = {"rank 0, bytes": [main], "rank 1, bytes": [other]}
            # A save that training waits for needs no staging: what is gathered, if anything, is one buffer.
            buffers = BUFFERS if is_async else 1
            detail = f"{main / 1e6:.0f} MB above the model's own; {saved / 1e6:.0f} MB saved; {buffers} buffer(s)"
            per_buffer = main / saved / buffers
            what = f"memory of rank 0 for each buffer, {strategy}, {how}"
            report.add(Line(what, per_buffer, "at most 1.05 x the saved bytes", 1.05, detail=detail))
            unit = "unit" if strategy == "FSDP1" else "parameter"
            detail = f"{other / 1e6:.1f} MB; the largest {unit} has {largest / 1e6:.1f} MB"
            what = f"memory of the other rank, {strategy}, {how}"
            report.add(Line(what, other / largest, f"at most the largest {unit}", 1.0, detail=detail))
    return report


if __name__ == "__main__":
    measure.main("memory", run)

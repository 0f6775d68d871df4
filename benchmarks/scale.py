"""How do the costs grow with the number of ranks? One machine with few cores: see docs/scale.md for what follows."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks import measure
from benchmarks.measure import Line, Report, resident
from keepbest import BestKeeper, TrainingIteration
from keepbest.formats import torch_file  # noqa: F401  # an import is no part of what a rank pays for the others
from keepbest.settings import KeeperSettings  # noqa: F401  # the same

PAYLOAD = 48
MEGABYTES = 8
RANKS = (2, 4, 8, 16, 32)


def sockets() -> int:
    links = Path("/proc/self/fd").iterdir()
    return sum(str(link.readlink()).startswith("socket:") for link in links if link.is_symlink())


def measure_on_rank(folder: Path, calls: int, is_lazy: bool) -> dict[str, Any]:
    """Costs as this rank sees them: seconds, bytes, numbers."""
    world_size = dist.get_world_size()
    model = DistributedDataParallel(measure.make_model(MEGABYTES))
    measure.meet()
    os.environ["TORCH_GLOO_LAZY_INIT"] = str(int(is_lazy))  # from here on: for the group of the control plane
    before = sockets(), resident()
    started = time.perf_counter()
    keeper = BestKeeper(model, directory=folder / "run", metric_key="loss/val")
    connect = time.perf_counter() - started
    keeper.start()
    after = sockets(), resident()
    mine = torch.zeros(PAYLOAD, dtype=torch.uint8)
    rows = list(torch.empty(world_size, PAYLOAD, dtype=torch.uint8).unbind(0))
    quiet, bare, best = [], [], []
    keeper.observe(0.0, TrainingIteration(update=1))
    for call in range(calls):
        dist.all_gather(rows, mine)
        started = time.perf_counter()
        keeper.observe(1.0, TrainingIteration(update=2 + call))
        quiet.append(time.perf_counter() - started)
        dist.all_gather(rows, mine)
        started = time.perf_counter()
        dist.all_gather(rows, mine)
        bare.append(time.perf_counter() - started)
    for save in range(5):
        measure.meet()
        started = time.perf_counter()
        keeper.observe(-1.0 - save, TrainingIteration(update=2 + calls + save))
        best.append(time.perf_counter() - started)
    keeper.close()
    return {
        "connect": connect,
        "quiet interval": statistics.median(quiet),
        "bare all_gather": statistics.median(bare),
        f"new best of {MEGABYTES} MB": statistics.median(best),
        "connections": after[0] - before[0],
        "bytes resident": after[1] - before[1],
    }


def run(quick: bool) -> Report:
    report = Report()
    settings = [(2, False), (4, False)] if quick else [(ranks, lazy) for lazy in (False, True) for ranks in RANKS]
    for world_size, is_lazy in settings:
        with measure.scratch() as folder:
            ranks = measure.on_ranks(world_size, measure_on_rank, folder, 20 if quick else 300, is_lazy)
        largest = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
        where = f"{world_size} ranks" + (", lazy connections" if is_lazy else "")
        report.samples[where] = {name: [float(rank[name]) for rank in ranks] for name in largest}
        for name, value in largest.items():
            unit, scale = ("MB", 1e-6) if "bytes" in name else ("", 1) if name == "connections" else ("ms", 1e3)
            report.add(Line(f"{name}, {where}, on the slowest", value * scale, unit=unit))
    return report


if __name__ == "__main__":
    measure.main("scale", run)

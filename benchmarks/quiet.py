"""What does an interval without a new best cost?"""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks import measure
from benchmarks.measure import Line, Report, Samples
from keepbest import BestKeeper, TrainingIteration

OURS, BARE = "observe", "all_gather"
PAYLOAD = 48  # bytes: what a rank sends when it observes


def write_history(folder: Path, observations: int) -> None:
    """A run folder of so many observations, of which the first is the best."""
    with BestKeeper(torch.nn.Linear(1, 1), directory=folder, metric_key="loss/val") as keeper:
        for update in range(observations):
            keeper.observe(float(update), TrainingIteration(update=update + 1))


def measure_on_rank(folder: Path, megabytes: int, observations: int, calls: int) -> tuple[Samples, Samples]:
    """Seconds of each call on this rank, and of connecting and resuming."""
    model = measure.make_model(megabytes)
    world_size = dist.get_world_size()
    started = time.perf_counter()
    keeper = BestKeeper(model, directory=folder, metric_key="loss/val", resume="ledger")
    connected = time.perf_counter()
    keeper.start()
    once = {"connect": [connected - started], "resume": [time.perf_counter() - connected]}
    # The ranks begin together by a group of its own, so that neither of the two is measured on one that was just used.
    group, others = dist.new_group(backend="gloo"), dist.new_group(backend="gloo")
    mine = torch.zeros(PAYLOAD, dtype=torch.uint8)
    rows = list(torch.empty(world_size, PAYLOAD, dtype=torch.uint8).unbind(0))
    samples: Samples = {OURS: [], BARE: []}
    for call in range(calls + 20):
        dist.all_gather(rows, mine, group=others)
        started = time.perf_counter()
        keeper.observe(1e9 + call, TrainingIteration(update=observations + call + 1))
        ours = time.perf_counter() - started
        dist.all_gather(rows, mine, group=others)
        started = time.perf_counter()
        dist.all_gather(rows, mine, group=group)
        bare = time.perf_counter() - started
        if call >= 20:
            samples[OURS].append(ours)
            samples[BARE].append(bare)
    keeper.close()
    return samples, once


def slowest_rank(ranks: list[tuple[Samples, Samples]]) -> int:
    return max(range(len(ranks)), key=lambda rank: measure.ratio(ranks[rank][0], OURS, BARE))


def run(quick: bool) -> Report:
    calls, launches, long_history = (100, 1, 1000) if quick else (1000, 5, 100_000)
    report = Report()
    histories = {}
    with measure.scratch() as folder:
        for observations in (10, long_history):
            histories[observations] = folder / f"history-{observations}"
            measure.on_ranks(1, write_history, histories[observations], observations)
        settings = [(1, 10), (1, long_history), (8 if quick else 1000, 10)]
        for world_size in (2,) if quick else (2, 4):
            for megabytes, observations in settings:
                # Processes that were just started keep their luck with the two cores: one launch alone proves little.
                launched = []
                for _ in range(launches):
                    run_folder = folder / "run"
                    shutil.copytree(histories[observations], run_folder, symlinks=True)
                    ranks = measure.on_ranks(world_size, measure_on_rank, run_folder, megabytes, observations, calls)
                    shutil.rmtree(run_folder)
                    launched.append((_ratio_on_slowest(ranks), ranks))
                launched.sort(key=lambda each: each[0])
                value, ranks = launched[launches // 2]
                worst = slowest_rank(ranks)
                samples = ranks[worst][0]
                where = f"{world_size} ranks, {megabytes} MB, {observations:,} observations before"
                report.samples[where] = {
                    f"{name}, rank {rank}": [statistics.median(taken[name]), *statistics.quantiles(taken[name], n=20)]
                    for rank, (taken, _) in enumerate(ranks)
                    for name in taken
                }
                spread = f"{launches} launches {launched[0][0]:.2f} to {launched[-1][0]:.2f} x"
                detail = f"{spread}; rank {worst}: {_told(samples, OURS)}; {_told(samples, BARE)}"
                report.add(
                    Line(f"quiet interval, {where}", value, "at most 1.35 x a bare all_gather", 1.35, detail=detail)
                )
    return report


def _ratio_on_slowest(ranks: list[tuple[Samples, Samples]]) -> float:
    return measure.ratio(ranks[slowest_rank(ranks)][0], OURS, BARE)


def _told(samples: Samples, name: str) -> str:
    cuts = [cut * 1e6 for cut in statistics.quantiles(samples[name], n=20)]
    return f"{name} {statistics.median(samples[name]) * 1e6:.0f} ({cuts[0]:.0f} to {cuts[-1]:.0f}) us"


if __name__ == "__main__":
    measure.main("quiet", run)

"""What do snapshots cost that every rank writes a share of, beside those that rank 0 writes?"""

from __future__ import annotations

import gc
from pathlib import Path

from benchmarks import measure
from benchmarks.contestants import Keepbest, ended
from benchmarks.measure import Line, Report, Samples, Size, resident, shard

SHARDED, GATHERED = "keepbest, format dcp", "keepbest, written by rank 0"
_ALLOWED = 64e6  # bytes that a rank may take beyond its own shard


def measure_times(world_size: int, folder: Path, size: Size) -> Samples:
    model = shard(measure.make_model(size.megabytes), world_size)
    contestants = {
        SHARDED: Keepbest(model, folder / "dcp", format="dcp"),
        GATHERED: Keepbest(model, folder / "torch"),
    }
    with ended(contestants):
        return measure.alternate(contestants, size.repetitions)


def measure_memory(world_size: int, folder: Path, size: Size, async_save: bool) -> tuple[int, int]:
    """Bytes above the model's own at the worst moment of the saves; bytes of this rank's shard."""
    plain = measure.make_model(size.megabytes)
    own = measure.weight_bytes(plain) // world_size
    model = shard(plain, world_size)
    del plain
    small = shard(measure.make_model(1), world_size)
    warm = Keepbest(small, folder / "warm", format="dcp", async_save=async_save)
    warm.act()  # what torch imports on first use is none of the weights
    warm.end()
    keeper = Keepbest(model, folder, format="dcp", async_save=async_save)
    measure.meet()
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest
    for _ in range(size.repetitions):
        keeper.act()
    keeper.settle()
    above = resident("VmHWM") - before
    keeper.end()
    return above, own


def run(quick: bool) -> Report:
    size = Size(8, 3) if quick else Size(1000, 7)
    report = Report()
    for world_size in (2,) if quick else (2, 4):
        with measure.scratch() as folder:
            samples = measure.on_ranks(world_size, measure_times, world_size, folder, size)[0]
        report.samples[f"{world_size} ranks"] = samples
        figures = measure.figures(samples, SHARDED, GATHERED)
        what = f"durable save by all of {world_size} ranks, FSDP2"
        report.add(Line(what, measure.ratio(samples, SHARDED, GATHERED), "reported: x rank 0 alone", detail=figures))
        with measure.scratch() as folder:
            ranks = measure.on_ranks(world_size, measure_memory, world_size, folder, size, False)
        above, own = max(ranks, key=lambda rank: rank[0])
        detail = f"{above / 1e6:.0f} MB above the model's own; a rank's shard has {own / 1e6:.0f} MB"
        what = f"memory of the worst of {world_size} ranks, format dcp"
        bar = "at most the own shard and 64 MB"
        report.add(Line(what, above / (own + _ALLOWED), bar, 1.0, detail=detail))
    return report


if __name__ == "__main__":
    measure.main("sharded", run)

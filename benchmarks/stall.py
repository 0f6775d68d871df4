"""How long does a new best hold up training, when it is saved in the background?"""

from __future__ import annotations

from pathlib import Path

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks import measure
from benchmarks.contestants import (
    ASYNC_PEERS,
    SYNC_PEERS,
    TUNED,
    TUNED_PEER,
    Action,
    ColdKeepbest,
    Copy,
    Keepbest,
    ended,
)
from benchmarks.measure import Line, Report, Samples, Size

OURS, FIRST, COPY = "keepbest", "keepbest, first best of a run", "copy into warm buffers"
AS_THEY_COME = SYNC_PEERS | ASYNC_PEERS


def measure_on_rank(folder: Path, size: Size, is_ddp: bool) -> Samples:
    model: nn.Module = measure.make_model(size.megabytes)
    if is_ddp:
        model = DistributedDataParallel(model)
    contestants: dict[str, Action] = {
        COPY: Copy(model),
        OURS: Keepbest(model, folder, async_save=True),
        FIRST: ColdKeepbest(model, folder, async_save=True, seconds=size.megabytes / 200),  # 5 s for 1 GB
    }
    contestants |= {name: make(model, folder) for name, make in (AS_THEY_COME | TUNED_PEER).items()}
    with ended(contestants):
        # Two rounds to warm up, since there are two staging buffers.
        return measure.alternate(contestants, size.repetitions, warm_up=2)


def run(quick: bool) -> Report:
    size = Size(8, 3) if quick else Size(1000, 7)
    report = Report()
    for where, ranks in (("one process", 1), ("DDP, 2 ranks", 2)):
        with measure.scratch() as folder:
            samples = measure.on_ranks(ranks, measure_on_rank, folder, size, ranks > 1)[0]
        report.samples[where] = samples
        copies = measure.ratio(samples, OURS, COPY)
        figures = measure.figures(samples, OURS, COPY)
        report.add(
            Line(f"async stall of a new best, {where}", copies, "at most 1.3 x a warm copy", 1.3, detail=figures)
        )
        for peer in AS_THEY_COME:
            less = measure.ratio(samples, peer, OURS)
            what = f"stall of {peer} beside it, {where}"
            report.add(Line(what, less, "at least 3 x ours", 3.0, at_least=True, detail=measure.figures(samples, peer)))
        tuned = measure.ratio(samples, OURS, TUNED)
        figures = measure.figures(samples, TUNED)
        report.add(Line(f"beside {TUNED}, {where}", tuned, "at most 1.1 x the tuned peer", 1.1, detail=figures))
        cold = measure.ratio(samples, FIRST, OURS)
        figures = measure.figures(samples, FIRST)
        report.add(
            Line(f"first best of a run, after 5 s, {where}", cold, "at most 1.5 x a warm one", 1.5, detail=figures)
        )
    return report


if __name__ == "__main__":
    measure.main("stall", run)

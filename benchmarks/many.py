"""What do thousands of small tensors cost at a new best, beside a copy of their bytes?"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from benchmarks import measure
from benchmarks.contestants import Action, Copy, Keepbest, ended
from benchmarks.measure import Line, Report, Samples

OURS, COPY = "keepbest", "copy of each tensor"
_WIDTH = 64  # a weight has 16 KiB


def measure_on_rank(folder: Path, count: int, repetitions: int) -> Samples:
    model = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(count)))
    contestants: dict[str, Action] = {COPY: Copy(model), OURS: Keepbest(model, folder, async_save=True)}
    with ended(contestants):
        return measure.alternate(contestants, repetitions, warm_up=2)


def run(quick: bool) -> Report:
    report = Report()
    count, repetitions = (20, 3) if quick else (2000, 21)
    with measure.scratch() as folder:
        samples = measure.on_ranks(1, measure_on_rank, folder, count, repetitions)[0]
    report.samples["one process"] = samples
    figures = measure.figures(samples, OURS, COPY, scale=1e3, unit="ms")
    copies = measure.ratio(samples, OURS, COPY)
    report.add(
        Line(f"new best of {count:,} tensors of 16 KiB", copies, "at most 2 x a copy of the bytes", 2.0, detail=figures)
    )
    return report


if __name__ == "__main__":
    measure.main("many", run)

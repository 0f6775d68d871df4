"""Does anything grow over a thousand saves?"""

from __future__ import annotations

import gc
import threading
from pathlib import Path

from benchmarks import measure
from benchmarks.contestants import Keepbest
from benchmarks.measure import Line, Report, resident

MEGABYTES = 8


def counts() -> dict[str, int]:
    gc.collect()
    return {
        "bytes resident": resident(),
        "file descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "Python threads": threading.active_count(),
    }


def measure_saves(folder: Path, is_async: bool, saves: int) -> list[dict[str, int]]:
    """Counts after each tenth of the saves."""
    keeper = Keepbest(measure.make_model(MEGABYTES), folder, **({"async_save": True} if is_async else {}))
    taken = []
    for number in range(1, saves + 1):
        keeper.act()
        if number % (saves // 10) == 0:
            keeper.settle()
            taken.append(counts())
    keeper.end()
    return taken


def run(quick: bool) -> Report:
    saves = 20 if quick else 1000
    report = Report()
    for how, is_async in (("sync", False), ("async", True)):
        with measure.scratch() as folder:
            taken = measure.on_ranks(1, measure_saves, folder, is_async, saves)[0]
        report.samples[how] = {name: [entry[name] for entry in taken] for name in taken[0]}
        for name in ("file descriptors", "threads"):
            grown = taken[-1][name] - taken[0][name]
            figures = f"{taken[0][name]} after {saves // 10} saves, {taken[-1][name]} after {saves}"
            report.add(Line(f"growth of {name} over {saves} saves, {how}", grown, "none", 0.0, unit="", detail=figures))
        first, last = (entry["bytes resident"] for entry in (taken[0], taken[-1]))
        # What the ledger tells is also held in memory: a few hundred bytes for each observation.
        per_save = (last - first) / (saves * 0.9) / 1e3
        figures = (
            f"{first / 1e6:.1f} MB after {saves // 10} saves, {last / 1e6:.1f} MB after {saves}; {MEGABYTES} MB a save"
        )
        what = f"growth of memory for each of {saves} saves, {how}"
        report.add(Line(what, per_save, "at most 2 kB, for the history", 2.0, unit="kB", detail=figures))
    return report


if __name__ == "__main__":
    measure.main("endurance", run)

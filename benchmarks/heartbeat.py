"""How long is the training thread held up at a time, while a best is written in the background?

The training thread beats as fast as it can; the longest gap between two beats is how long something (the interpreter's
lock, or the scheduler) kept it. The same heartbeat, for as long, without a writer, tells what the machine itself does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import measure
from benchmarks.contestants import ASYNC_PEERS, FROM_A_PROCESS, TUNED_PEER, Action, Dcp, Keepbest, Lightning
from benchmarks.measure import Line, Report, Samples, Size

OURS, ALONE = "keepbest", "no writer"
_LOOKS_EVERY = 0.01


class Written:
    """Tells whether the write is over, by looking at the disk or at the contestant."""

    def __init__(self, contestant: Action, folder: Path) -> None:
        self._contestant = contestant
        self._folder = folder
        self._known: set[str] = set()

    def begin(self) -> None:
        self._known = self._names()

    def __call__(self) -> bool:
        if isinstance(self._contestant, Dcp):
            return self._contestant.is_done()
        if isinstance(self._contestant, Lightning):
            return self._contestant.is_done()
        names = self._names()
        return len(names) == 1 and names != self._known  # the new best is there, and the one before is removed

    def _names(self) -> set[str]:
        snapshots = self._folder / "keepbest-0" / "checkpoints" / "snapshots"
        return {path.name for path in snapshots.glob("[!.]*")} if isinstance(self._contestant, Keepbest) else set()


def longest_gap(is_over: Callable[[], bool]) -> tuple[float, float]:
    """The longest time between two beats of this thread, and how long it beat, in seconds."""
    started = last = time.perf_counter()
    longest, looks_at = 0.0, started + _LOOKS_EVERY
    while True:
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
        if now >= looks_at:
            looks_at = now + _LOOKS_EVERY
            if is_over():
                return longest, now - started


def measure_gaps(folder: Path, size: Size) -> tuple[Samples, Samples]:
    model = measure.make_model(size.megabytes)
    contestants: dict[str, Action] = {OURS: Keepbest(model, folder, async_save=True)}
    contestants |= {name: make(model, folder) for name, make in (ASYNC_PEERS | TUNED_PEER | FROM_A_PROCESS).items()}
    gaps: Samples = {name: [] for name in [*contestants, ALONE]}
    lengths: Samples = {name: [] for name in contestants}
    for number in range(size.repetitions + 1):
        for name, contestant in contestants.items():
            measure.settle_disk()
            written = Written(contestant, folder)
            written.begin()
            contestant.act()
            gap, seconds = longest_gap(written)
            contestant.settle()
            if number:
                gaps[name].append(gap)
                lengths[name].append(seconds)
        measure.settle_disk()
        until = time.perf_counter() + statistics.median(lengths[OURS] or [0.5])
        if number:
            gaps[ALONE].append(longest_gap(lambda until=until: time.perf_counter() >= until)[0])
    for contestant in contestants.values():
        contestant.end()
    return gaps, lengths


def run(quick: bool) -> Report:
    size = Size(64, 3) if quick else Size(1000, 9)
    report = Report()
    with measure.scratch() as folder:
        gaps, lengths = measure.on_ranks(1, measure_gaps, folder, size)[0]
    report.samples = {"longest gap": gaps, "length of the write": lengths}
    alone = statistics.median(gaps[ALONE])
    for name in lengths:
        held = (statistics.median(gaps[name]) - alone) * 1e3
        figures = (
            measure.figures(gaps, name, ALONE, scale=1e3, unit="ms")
            + "; "
            + measure.figures({"write": lengths[name]}, "write")
        )
        bar = ("at most 20 ms", 20.0) if name == OURS else ("reported", None)
        report.add(Line(f"training thread held up by the writer of {name}", held, *bar, unit="ms", detail=figures))
    return report


if __name__ == "__main__":
    measure.main("heartbeat", run)

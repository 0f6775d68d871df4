"""What does it cost to keep the best for a tolerance that was just exceeded?"""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks import measure
from benchmarks.contestants import Action
from benchmarks.measure import Line, Report, Samples, Size
from keepbest import BestKeeper, TrainingIteration

OURS, BARE = "tolerance event", "append, fsync, link, rename"


class Exceed(Action):
    """Observes a worse value, with which one more tolerance is exceeded, each time."""

    def __init__(self, folder: Path, megabytes: int, events: int) -> None:
        model = measure.make_model(megabytes)
        self.keeper = BestKeeper(
            model, directory=folder / "run", metric_key="loss/val", tolerances=range(events), metric_reduction="mean"
        )
        self._update = 1
        self.keeper.observe(0.0, TrainingIteration(update=1))

    def act(self) -> None:
        self._update += 1
        outcome = self.keeper.observe(1.0, TrainingIteration(update=self._update))
        if len(outcome.newly_exceeded) != 1:
            raise RuntimeError("a tolerance should have been exceeded")

    def end(self) -> None:
        self.keeper.close()


class Bare(Action):
    """The file operations that this needs, with as many bytes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "bare"
        self._folder.mkdir()
        self._ledger = os.open(self._folder / "ledger", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._number = 0

    def act(self) -> None:
        self._number += 1
        os.write(self._ledger, b"x" * 180 + b"\n")
        os.fsync(self._ledger)
        temporary = self._folder / "temporary"
        temporary.symlink_to("snapshots/U1")
        temporary.replace(self._folder / f"tolerance={self._number}")

    def end(self) -> None:
        os.close(self._ledger)


def measure_events(folder: Path, size: Size) -> Samples:
    warm_up = 3
    contestants: dict[str, Action] = {
        BARE: Bare(folder),
        OURS: Exceed(folder, size.megabytes, size.repetitions + warm_up),
    }
    samples = measure.alternate(contestants, size.repetitions, warm_up=warm_up)
    for contestant in contestants.values():
        contestant.end()
    return samples


def run(quick: bool) -> Report:
    report = Report()
    for megabytes in (1,) if quick else (1, 1000):
        with measure.scratch() as folder:
            samples = measure.on_ranks(1, measure_events, folder, Size(megabytes, 20 if quick else 300))[0]
        report.samples[f"{megabytes} MB"] = samples
        told = measure.told(samples, OURS, BARE, scale=1e3, unit="ms")
        value = measure.ratio(samples, OURS, BARE)
        report.add(
            Line(f"tolerance event, {megabytes} MB", value, "at most 3 x the bare file operations", 3.0, detail=told)
        )
    return report


if __name__ == "__main__":
    measure.main("tolerance", run)

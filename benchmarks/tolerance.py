"""What does it cost to keep the best for a tolerance that was just exceeded?"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.contestants import Action
from benchmarks.measure import Line, Report, Samples, Size
from keepbest import BestKeeper, TrainingIteration

OURS, BACKGROUND, BARE = "tolerance event", "tolerance event, async_save", "append, fsync, link, rename"
TOLERANCES = 5


class Exceed(Action):
    """Observes a worse value, with which one more tolerance is exceeded, each time."""

    def __init__(self, folder: Path, megabytes: int, **settings: Any) -> None:
        self._model = measure.make_model(megabytes)
        self._folder = folder
        self._settings = settings
        self._events = 0
        self.keeper: BestKeeper | None = None

    def prepare(self) -> None:
        if self._events % TOLERANCES == 0:  # all of them are exceeded: a new run
            self.end()
            folder = self._folder / f"run-{self._events}"
            tolerances = range(TOLERANCES)
            self.keeper = BestKeeper(
                self._model, directory=folder, metric_key="loss/val", tolerances=tolerances, **self._settings
            )
            self.keeper.observe(0.0, TrainingIteration(update=1))
            self.keeper.flush()

    def act(self) -> None:
        self._events += 1
        outcome = self.keeper.observe(1.0, TrainingIteration(update=1 + self._events))
        if len(outcome.newly_exceeded) != 1:
            raise RuntimeError("a tolerance should have been exceeded")

    def settle(self) -> None:
        self.keeper.flush()

    def end(self) -> None:
        if self.keeper is not None:
            self.keeper.close()
            shutil.rmtree(self.keeper.directory)


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
    contestants: dict[str, Action] = {
        BARE: Bare(folder),
        OURS: Exceed(folder / "sync", size.megabytes),
        BACKGROUND: Exceed(folder / "async", size.megabytes, async_save=True),
    }
    samples = measure.alternate(contestants, size.repetitions)
    for contestant in contestants.values():
        contestant.end()
    return samples


def run(quick: bool) -> Report:
    report = Report()
    for megabytes in (1,) if quick else (1, 1000):
        with measure.scratch() as folder:
            samples = measure.on_ranks(1, measure_events, folder, Size(megabytes, 20 if quick else 100))[0]
        report.samples[f"{megabytes} MB"] = samples
        figures = measure.figures(samples, OURS, BARE, scale=1e3, unit="ms")
        value = measure.ratio(samples, OURS, BARE)
        report.add(
            Line(f"tolerance event, {megabytes} MB", value, "at most 3 x the bare file operations", 3.0, detail=figures)
        )
    return report


if __name__ == "__main__":
    measure.main("tolerance", run)

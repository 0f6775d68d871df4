"""What does a new best cost a model that trains on a GPU?

The time that training loses is that between two matrix products of it on the device, with a best between them. What
holds up the host alone, while the device has work, costs nothing there. What a best costs the products that follow is
in the time of the whole loop, which is reported: a device that waited is faster for a while, by more than a best costs.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import measure
from benchmarks.contestants import Action, Dcp, Keepbest, RawWrite, TorchSave, ended
from benchmarks.cuda_contestants import (
    DEVICE,
    ON_CUDA,
    Pinned,
    Training,
    TunedDcp,
    Weights,
    Within,
    can_stage_twice,
    finish,
    seconds_of,
)
from benchmarks.measure import Line, Report, Samples
from keepbest.staging.memory import Size, allocate

MIB, GIB = 1 << 20, 1 << 30
ALONE, OURS, PINNED, FRESH, TUNED, SAVE = (
    "training alone",
    "keepbest",
    "pinned copy on its stream",
    "dcp.async_save",
    "dcp.async_save, pinned staging",
    "torch.save",
)
_ROOM = 20 * GIB  # bytes that the largest run may need
_STEPS = {"after training": 20, "after a wait for the disk": 0}  # of training, before the host is timed
_PRECISE = 3  # times as many repetitions where a millisecond counts


class Rounds(NamedTuple):
    """Seconds of each round.

    Attributes:
        lost: What training lost, by what it was lost to.
        whole: What the loop took.
    """

    lost: Samples
    whole: Samples

    def cost(self, name: str) -> float:
        """Seconds of training that something cost, in the median."""
        return statistics.median(self.lost[name])

    def in_words(self, *names: str) -> str:
        return measure.figures(self.lost, *names, scale=1e3, unit="ms")

    def report(self, report: Report, what: str, name: str) -> None:
        """Add what it cost the whole loop, and all samples."""
        report.samples[what] = self.lost
        report.samples[f"{what}, the whole loop"] = self.whole
        longer = statistics.median(self.whole[name]) - statistics.median(self.whole[ALONE])
        figures = measure.figures(self.whole, ALONE, name, scale=1e3, unit="ms")
        report.add(Line("the whole loop is longer by", longer * 1e3, unit="ms", detail=figures))


@contextmanager
def _memory_folder() -> Iterator[Path]:
    """A folder in memory, so that no disk is measured; on the disk where there is too little of it."""
    where = Path("/dev/shm")
    is_large = where.is_dir() and shutil.disk_usage(where).free > _ROOM
    with tempfile.TemporaryDirectory(prefix="bench-", dir=where if is_large or not ON_CUDA else None) as folder:
        yield Path(folder)


@contextmanager
def _ballast(leaves: int) -> Iterator[None]:
    """Takes all memory of the device except `leaves` bytes."""
    if not ON_CUDA:
        yield
        return
    torch.cuda.empty_cache()
    held = []
    try:
        # In pieces, since there may be no room for all of it in one.
        for piece in (GIB, 64 * MIB, 10 * MIB):
            with suppress(torch.OutOfMemoryError):  # what is left may be in smaller pieces yet
                while torch.cuda.mem_get_info()[0] >= piece + leaves:
                    held.append(torch.empty(piece, dtype=torch.uint8, device=DEVICE))
        yield
    finally:
        held.clear()
        torch.cuda.empty_cache()


def _rounds(training: Training, contestants: Mapping[str, Action], repetitions: int) -> Rounds:
    within = {name: Within(training, action) for name, action in {ALONE: Action(), **contestants}.items()}
    with ended(within):
        # Two rounds to warm up, since there are two staging buffers.
        whole = measure.alternate(within, repetitions, warm_up=2)
    return Rounds({name: action.lost[-repetitions:] for name, action in within.items()}, whole)


def raw_numbers(report: Report, size: int) -> None:
    """What the machine can do, to judge the rest by."""
    source = torch.rand(size // 4, device=DEVICE)
    pinned = torch.empty(source.shape, pin_memory=ON_CUDA)
    registered = torch.from_numpy(allocate(Size(size, is_pinned=ON_CUDA))).view(source.dtype)
    clone = torch.empty_like(source)
    for what, call in (
        ("pinned copy", lambda: pinned.copy_(source, non_blocking=True)),
        ("copy into memory that a keeper has pinned", lambda: registered.copy_(source, non_blocking=True)),
        ("device clone", lambda: clone.copy_(source)),
    ):
        seconds = statistics.median([seconds_of(call) for _ in range(6)][1:])
        report.add(Line(f"{what} of {_named(size)}", seconds * 1e3, unit="ms"))
    if ON_CUDA:
        pages = torch.zeros(size, dtype=torch.uint8)
        runtime = torch.cuda.cudart()
        started = time.perf_counter()
        torch.cuda.check_error(int(runtime.cudaHostRegister(pages.data_ptr(), size, 0)))
        seconds = time.perf_counter() - started
        torch.cuda.check_error(int(runtime.cudaHostUnregister(pages.data_ptr())))
        report.add(Line(f"cudaHostRegister of {_named(size)}, touched", seconds * 1e3, unit="ms"))


def _named(size: int) -> str:
    return f"{size / GIB:g} GiB" if size >= GIB else f"{size // MIB} MiB"


def training_time(report: Report, training: Training, size: int, repetitions: int, *, has_peers: bool) -> None:
    model = Weights(100, size // 100 // 4096 * 4096)
    with _memory_folder() as folder:
        contestants: dict[str, Action] = {OURS: Keepbest(model, folder, async_save=True), PINNED: Pinned(model)}
        rounds = _rounds(training, contestants, _PRECISE * repetitions if has_peers else repetitions)
    what = f"training time lost to a best of {_named(size)}, memory free"
    per_gib = rounds.cost(OURS) * 1e3 / (model.bytes / GIB)
    report.add(Line(what, per_gib, "at most 1.5 ms per GiB", 1.5, unit="ms", detail=rounds.in_words(OURS, PINNED)))
    rounds.report(report, what, OURS)
    if has_peers:
        _beside_peers(report, training, model, repetitions, rounds.cost(OURS))


def _beside_peers(report: Report, training: Training, model: Weights, repetitions: int, ours: float) -> None:
    """What peers cost, beside the seconds of training that we do."""
    with _memory_folder() as folder:
        contestants: dict[str, Action] = {
            FRESH: Dcp(model, folder, "fresh"),
            TUNED: TunedDcp(model, folder),
            SAVE: TorchSave(model, folder, sync=False),
        }
        rounds = _rounds(training, contestants, repetitions)
    report.samples["training time lost to peers"] = rounds.lost
    for peer in (FRESH, SAVE):
        is_bar = peer == FRESH
        report.add(
            Line(
                f"training time lost to {peer} beside it",
                rounds.cost(peer) / ours,
                "at least 3 x ours" if is_bar else "reported",
                3.0 if is_bar else None,
                at_least=True,
                detail=rounds.in_words(peer),
            )
        )
    value = ours / rounds.cost(TUNED)
    kept = "" if can_stage_twice() else " (this torch keeps no staging buffers)"
    report.add(Line(f"beside {TUNED}", value, "at most 1.0 x", 1.0, detail=rounds.in_words(TUNED) + kept))


def without_memory(report: Report, training: Training, size: int, repetitions: int) -> None:
    model = Weights(100, size // 100 // 4096 * 4096)
    with _memory_folder() as folder, _ballast(8 * MIB):
        ours = Keepbest(model, folder, async_save=True)
        contestants = {OURS: ours, PINNED: Pinned(model)}
        ours.act()
        ours.settle()  # what `start` loads in the background is there
        if ON_CUDA:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if ON_CUDA else 0
        rounds = _rounds(training, contestants, _PRECISE * repetitions)
        grown = torch.cuda.max_memory_allocated() - before if ON_CUDA else 0
    what = f"training time lost to a best of {_named(size)}, no memory free"
    value = rounds.cost(OURS) / rounds.cost(PINNED)
    report.add(Line(what, value, "at most 1.1 x the pinned copy", 1.1, detail=rounds.in_words(OURS, PINNED)))
    rounds.report(report, what, OURS)
    report.add(Line("device memory grows at its peak, no memory free", grown / MIB, "by nothing", 0.0, unit="MiB"))


def host_time(report: Report, shapes: Mapping[tuple[int, int], float], repetitions: int) -> None:
    """Time of the host in `observe`, when the device has nothing to do.

    The host comes from steps of an optimizer, as it does in training. Where it had to wait before, it takes longer,
    since its clock is slow then and its caches are cold. That is reported.
    """
    for (count, each), bar in shapes.items():
        model = Weights(count, each)
        samples: Samples = {name: [] for name in _STEPS}
        with _memory_folder() as folder:
            ours = Keepbest(model, folder, async_save=True)
            try:
                for number in range(2 + repetitions):
                    for name, taken in samples.items():
                        _settle(model, _STEPS[name])
                        started = time.perf_counter()
                        ours.act()
                        seconds = time.perf_counter() - started
                        ours.settle()
                        if number >= 2:  # since there are two staging buffers
                            taken.append(seconds)
                _settle(model, max(_STEPS.values()))
                longest = measure.longest_functions(ours.act)
                ours.settle()
            finally:
                ours.end()
        what = f"observe holds up the host, {count} tensors of {each / MIB:.3g} MiB"
        report.samples[what] = samples
        for name, steps in _STEPS.items():
            line = Line(f"{what}, {name}", statistics.median(samples[name]) * 1e3, unit="ms")
            line = replace(line, detail=measure.figures(samples, name, scale=1e3, unit="ms"))
            report.add(replace(line, bar=f"at most {bar:g} ms", limit=bar) if steps else line)
        print(f"    in one of them, slowed by the profiler: {longest}")


def _settle(model: Weights, steps: int) -> None:
    measure.settle_disk()
    model.train_for(steps)
    finish()


def first_best(report: Report, training: Training, size: int, repetitions: int, seconds: float) -> None:
    """The stall of the first best of a run that has trained a while, and of later ones."""
    model = Weights(100, size // 100 // 4096 * 4096)
    samples: Samples = {"first": [], "warm": []}
    with _memory_folder() as folder:
        for number in range(repetitions):
            if ON_CUDA:
                torch.cuda.empty_cache()  # else torch would have memory for the copies from the run before
            ours = Keepbest(model, folder / str(number), async_save=True)
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                training.step()
                finish()
            for best in range(5):
                finish()
                started = time.perf_counter()
                ours.act()
                took = time.perf_counter() - started
                samples["first" if best == 0 else "warm"].append(took)
                ours.settle()
            ours.end()
    what = f"first best of {_named(size)} after {seconds:g} s of training"
    report.samples[what] = samples
    detail = measure.figures(samples, "first", "warm", scale=1e3, unit="ms")
    report.add(Line(what, measure.ratio(samples, "first", "warm"), "at most 1.5 x a warm one", 1.5, detail=detail))


def durable(report: Report, size: int, repetitions: int) -> None:
    model = Weights(100, size // 100 // 4096 * 4096)
    values = [value.cpu() for value in model.state_dict().values()]
    for where, place in (("memory", _memory_folder()), ("disk", measure.scratch())):
        with place as folder:
            contestants: dict[str, Action] = {
                "raw write + fsync": RawWrite(values, folder / "raw"),
                OURS: Keepbest(model, folder),
            }
            try:
                samples = measure.alternate(contestants, repetitions)
                longest = measure.longest_functions(contestants[OURS].act)
                contestants[OURS].settle()
            finally:
                for each in contestants.values():
                    each.end()
        what = f"durable save of {_named(size)} to the {where}"
        report.samples[what] = samples
        value = measure.ratio(samples, OURS, "raw write + fsync")
        detail = measure.figures(samples, OURS, "raw write + fsync")
        report.add(Line(what, value, "at most 1.25 x raw write + fsync", 1.25, detail=detail))
        print(f"    in one of them, slowed by the profiler: {longest}")


def run(quick: bool) -> Report:
    report = Report()
    small, large = (8 * MIB, 16 * MIB) if quick else (GIB, 6 * GIB)
    repetitions, seconds = (2, 0.1) if quick else (5, 5.0)
    training = Training(24, 8192 if ON_CUDA else 64)
    name = torch.cuda.get_device_name() if ON_CUDA else "no GPU"
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, {repetitions} repetitions, medians")
    parts: dict[str, Callable[[], None]] = {
        "raw": lambda: raw_numbers(report, small),
        "first": lambda: first_best(report, training, small, 2, seconds),
        "host": lambda: host_time(
            report, {(100, small // 100 // 4096 * 4096): 2.0, _many(quick): 5.0}, _PRECISE * repetitions
        ),
        "time 1": lambda: training_time(report, training, small, repetitions, has_peers=True),
        "none": lambda: without_memory(report, training, small, repetitions),
        "durable": lambda: durable(report, small, 2 if quick else 7),
        "time 6": lambda: training_time(report, training, large, repetitions, has_peers=False),
    }
    for part, measure_it in parts.items():
        started = time.monotonic()
        measure.attempt(report, part, measure_it)
        if ON_CUDA:
            torch.cuda.empty_cache()
        print(f"({part}: {time.monotonic() - started:.1f} s)", flush=True)
    return report


def _many(quick: bool) -> tuple[int, int]:
    return (200 if quick else 5000), 64 * 1024


if __name__ == "__main__":
    if not ON_CUDA and "--quick" not in sys.argv:
        print("skipped: needs a CUDA device (--quick shows without one that the program runs)")
        sys.exit(0)
    measure.main("cuda", run)

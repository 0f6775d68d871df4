"""What all benchmarks share: models, ranks, interleaved timing, bars, and results that say where they are from."""

from __future__ import annotations

import argparse
import cProfile
import faulthandler
import functools
import gc
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from types import CodeType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    "keepbest",
    "torch",
    "pytorch-lightning",
    "pytorch-ignite",
    "numpy",
    "xxhash",
    "s3fs",
    "aiobotocore",
    "moto",
)
Samples = dict[str, list[float]]
_PATIENCE = 150  # seconds that no part of a benchmark takes


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured.

    Attributes:
        megabytes: of float32 weights, about; in transformer-like blocks.
        repetitions: of each contestant.
    """

    megabytes: int
    repetitions: int


@dataclass(frozen=True, slots=True)
class Line:
    """One measured figure beside its bar.

    Attributes:
        what: was measured.
        value: in `unit`.
        bar: in words.
        limit: the bar as a number; `None` where a figure is only reported.
        at_least: whether `value` must not be below `limit`, rather than not above.
        unit: of `value`: `x` is a ratio of medians.
        detail: the figures that `value` is made of.
    """

    what: str
    value: float
    bar: str = "reported"
    limit: float | None = None
    at_least: bool = False
    unit: str = "x"
    detail: str = ""

    @property
    def verdict(self) -> str:
        if self.limit is None:
            return ""
        return "meets" if (self.value >= self.limit if self.at_least else self.value <= self.limit) else "misses"

    def __str__(self) -> str:
        return f"{self.what:<66} {self.value:>8.3f} {self.unit:<3} {self.bar:<38} {self.verdict:<6}  {self.detail}"


@dataclass(slots=True)
class Report:
    """What one program found out.

    Attributes:
        lines: Figures beside their bars.
        samples: Seconds that they come from.
        failures: Parts that ended in an error, which the program has printed.
    """

    lines: list[Line] = field(default_factory=list)
    samples: dict[str, Samples] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, line: Line) -> None:
        self.lines.append(line)
        print(line, flush=True)


class Contestant(Protocol):
    """Does one thing that is timed. What it prepares before, and waits for and cleans up after, is not."""

    def prepare(self) -> None: ...
    def act(self) -> None: ...
    def settle(self) -> None: ...


def alternate(contestants: Mapping[str, Contestant], repetitions: int, *, warm_up: int = 1) -> Samples:
    """Seconds that each contestant took, each time on the slowest rank. **Collective**.

    One round after the other, so that what else happens on the machine hits all alike; who begins changes from round
    to round. Nothing is dropped but the `warm_up` rounds.
    """
    samples: Samples = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(warm_up + repetitions):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            contestants[name].prepare()
            settle_disk()
            meet()
            started = time.perf_counter()
            contestants[name].act()
            seconds = slowest(time.perf_counter() - started)
            contestants[name].settle()
            if number >= warm_up:
                samples[name].append(seconds)
    return samples


def attempt(report: Report, part: str, measure: Callable[[], None]) -> None:
    """Measure a part. If it fails, that is printed and noted, so that others can follow; if it hangs, where it does."""
    faulthandler.dump_traceback_later(_PATIENCE, repeat=True)
    try:
        measure()
    except Exception:  # noqa: BLE001  # `main` fails when the others are measured
        traceback.print_exc(file=sys.stdout)
        report.failures.append(part)
    finally:
        faulthandler.cancel_dump_traceback_later()
    gc.collect()  # what an error left behind


def longest_functions(call: Callable[[], Any]) -> str:
    """The functions in which the time of a call goes, those that they call left out, in ms, and how often they ran."""
    with cProfile.Profile() as profile:
        call()
    longest = sorted(profile.getstats(), key=lambda each: -each.inlinetime)
    whole = sum(each.inlinetime for each in longest)
    parts = (f"{_name(each.code)} {each.inlinetime * 1e3:.2f} ({each.callcount})" for each in longest[:12])
    return f"{whole * 1e3:.2f} in all, {', '.join(parts)}"


def _name(code: CodeType | str) -> str:
    return code if isinstance(code, str) else f"{Path(code.co_filename).stem}.{code.co_name}"


def settle_disk() -> None:
    """Write back what others left in the page cache, so that nobody's fsync pays for it."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        os.sync()


def meet() -> None:
    """All ranks go on from here together. **Collective**."""
    if dist.is_initialized():
        dist.barrier(_referee())


@functools.cache
def _referee() -> dist.ProcessGroup:
    """A group that nobody else uses: some contestants run collectives of the default group on a thread."""
    return dist.new_group(backend="gloo")


def slowest(seconds: float) -> float:
    """The largest of the ranks' numbers. **Collective**."""
    if not dist.is_initialized():
        return seconds
    dist.all_reduce(longest := torch.tensor(seconds, dtype=torch.float64), op=dist.ReduceOp.MAX, group=_referee())
    return float(longest)


def ratio(samples: Samples, name: str, beside: str) -> float:
    return statistics.median(samples[name]) / statistics.median(samples[beside])


def figures(samples: Samples, *names: str, scale: float = 1.0, unit: str = "s") -> str:
    """Median and spread of samples, in words."""
    parts = []
    for name in names:
        values = sorted(value * scale for value in samples[name])
        parts.append(f"{name} {statistics.median(values):.3g} ({values[0]:.3g} to {values[-1]:.3g}) {unit}")
    return "; ".join(parts)


def make_model(megabytes: int) -> nn.Sequential:
    """About so many MB of float32 weights: blocks of two wide matrices, with biases and norms, random values."""
    width = 128 if megabytes < 8 else 512 if megabytes < 512 else 2048
    block_megabytes = 8 * width * width * 4 / 1e6
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width))
        for _ in range(math.ceil(megabytes / block_megabytes))
    ]
    return nn.Sequential(*blocks)


def shard(model: nn.Sequential, world_size: int) -> nn.Module:
    """FSDP2 over all ranks, each block a unit."""
    mesh = init_device_mesh("cpu", (world_size,))
    for block in model:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def resident(what: str = "VmRSS") -> int:
    """Resident bytes of this process: `VmRSS` now, `VmHWM` at most since that was forgotten."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{what}:")[1].split()[0]) * 1024


def weight_bytes(model: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function` returned on each rank of a gloo group of new processes; one rank has no process group."""
    with tempfile.TemporaryDirectory() as folder, fresh_processes(world_size) as pool:
        rendezvous = f"file://{folder}/store"
        ranks = [pool.submit(_on_rank, rank, world_size, rendezvous, function, arguments) for rank in range(world_size)]
        return [rank.result() for rank in ranks]


@contextmanager
def fresh_processes(count: int) -> Iterator[ProcessPoolExecutor]:
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.contestants"])  # many ranks start in the time of one import of torch
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        yield pool


def _on_rank(
    rank: int, world_size: int, rendezvous: str, function: Callable[..., Any], arguments: Sequence[Any]
) -> Any:
    if world_size == 1:
        return function(*arguments)
    torch.set_num_threads(1)  # as torchrun does
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder on the disk that is measured: that of the working tree. Empty at first, gone at the end."""
    (ROOT / "runs").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=ROOT / "runs"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.sync()


def main(program: str, measure: Callable[[bool], Report]) -> None:
    """The command line of one benchmark: measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=f"python -m benchmarks.{program}")
    parser.add_argument(
        "--quick", action="store_true", help="small and few: shows that it runs; the figures mean nothing"
    )
    quick: bool = parser.parse_args().quick
    if quick:
        print("(quick: these figures only show that the program runs)")
    started = time.time()
    report = measure(quick)
    if not quick:
        _write(program, report, started)
    if report.failures:
        sys.exit(f"failed: {', '.join(report.failures)}")


def _write(program: str, report: Report, started: float) -> None:
    RESULTS.mkdir(exist_ok=True)
    result = {
        "program": program,
        "repeat": f"make bench-setup && .venv-bench/bin/python -m benchmarks.{program}",
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "took_seconds": round(time.time() - started),
        "machine": machine(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "lines": [{**asdict(line), "verdict": line.verdict} for line in report.lines],
        "samples": report.samples,
    }
    (RESULTS / f"{program}.json").write_text(json.dumps(result, indent=1) + "\n")


def _commit() -> str:
    """The code that was measured; results that were just written do not make it another one."""
    changed = _git("status", "--porcelain", "--", "src", "benchmarks/*.py")
    return _git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def machine() -> dict[str, Any]:
    cpu = next((row for row in Path("/proc/cpuinfo").read_text().splitlines() if row.startswith("model name")), "")
    disk = subprocess.run(
        ["findmnt", "-n", "-o", "FSTYPE,OPTIONS", "-T", str(ROOT)], capture_output=True, text=True, check=False
    )
    return {
        "cpu": cpu.partition(":")[2].strip(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "file_system": disk.stdout.strip(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

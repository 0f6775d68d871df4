"""What does the upload of a new best to a remote storage cost training?

Training steps of one thread are timed while a best is on its way, to a folder of the same disk (`file://`) and to an S3
server in a process of its own. Beside them: the same steps while nothing is uploaded, and while the storage's own
library uploads the same files, on a thread and from a process. Each keeps one copy, and removes the one before.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import torch
from torch import nn

from benchmarks import measure
from benchmarks.contestants import Action, Keepbest
from benchmarks.measure import Line, Report, Samples, Size
from keepbest import BestKeeper, TrainingIteration
from keepbest.reading.activity import read_activity

ALONE, OURS, PEER, PROCESS = "no upload", "keepbest", "plain upload on a thread", "plain upload from a process"
STORAGES = ("file", "S3")
FIGURES = ("mean step", "length", "waits", "longest wait", "stall")
BUCKET = "bucket"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
_LOOKS_EVERY = 0.01
_LEAST_SECONDS = 0.2


@contextlib.contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """An S3 server on loopback with an empty bucket; yields the environment in which `s3://bucket` leads there."""
    with socket.socket() as holder:  # bound until the server listens, so that no connection gets its port
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield from _s3_server_on(holder.getsockname()[1])


def _s3_server_on(port: int) -> Iterator[dict[str, str]]:
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    # It keeps large objects in memory, so that it does not compete for the disk.
    environment = os.environ | {"MOTO_S3_DEFAULT_KEY_BUFFER_SIZE": str(1 << 40)}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=5).close()
                break
            if time.monotonic() > deadline or server.poll() is not None:
                raise RuntimeError("the S3 server does not start: python -m moto.server")
            time.sleep(0.05)
        reaching = CREDENTIALS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
        os.environ.update(reaching)
        fsspec.filesystem("s3").mkdir(BUCKET)
        yield reaching
    finally:
        server.kill()
        server.wait()


def place_in(storage: str, folder: Path) -> str:
    """The URL below which a program that measures in `folder` keeps its copies."""
    return f"file://{folder}/there" if storage == "file" else f"s3://{BUCKET}/{folder.name}"


def opened(url: str) -> tuple[Any, str]:
    """The filesystem of a URL, made as keepbest makes it, and the path there."""
    filesystem, path = fsspec.core.url_to_fs(url, **({"auto_mkdir": True} if url.startswith("file:") else {}))
    return filesystem, path


def plain_upload(snapshot: Path, url: str, before: Path | None = None) -> None:
    """What one would write for the same: put the files of the new best and the ledger, remove the one before."""
    filesystem, path = opened(url)
    filesystem.put(f"{snapshot}/", f"{path}/{snapshot.name}/", recursive=True)
    filesystem.put(str(snapshot.parents[1] / "ledger.jsonl"), f"{path}/ledger.jsonl")
    if before is not None:
        filesystem.rm(f"{path}/{before.name}", recursive=True)


def kept_in(run: Path) -> Path:
    """The only snapshot of a run."""
    return next((run / "checkpoints" / "snapshots").glob("[!.]*"))


class Best(Keepbest):
    """A keeper without a remote copy. Its steps are timed while nothing is uploaded, as long as an upload takes."""

    def __init__(self, model: nn.Module, folder: Path, **settings: Any) -> None:
        super().__init__(model, folder, **({"async_save": True} | settings))
        self.seconds = _LEAST_SECONDS
        self._until = 0.0

    @property
    def run(self) -> Path:
        return Path(self.keeper.directory)

    def begin(self) -> None:
        """Begin the upload of the best that was just committed."""
        self._until = time.perf_counter() + self.seconds

    def is_over(self) -> bool:
        """Whether the upload has ended."""
        return time.perf_counter() >= self._until

    def end(self) -> None:
        while not self.is_over():
            time.sleep(_LOOKS_EVERY)
        super().end()


class Following(Best):
    """A keeper with a remote copy, which begins the upload by itself."""

    def __init__(self, model: nn.Module, folder: Path, url: str, **settings: Any) -> None:
        super().__init__(model, folder, remote=url, **settings)
        self._storage, path = opened(url)
        self._path = f"{path}/checkpoints/snapshots"

    def begin(self) -> None:
        """Nothing."""

    def is_over(self) -> bool:
        activity = read_activity(self.run)
        if activity is None or activity.uploading:
            return False
        # It has not begun, or has ended. The storage knows, and is asked only here.
        self._storage.invalidate_cache()
        names = {path.removeprefix(f"{self._path}/").split("/")[0] for path in self._storage.find(self._path)}
        return names == {kept_in(self.run).name}


class Peer(Best):
    """A keeper without a remote copy, beside an upload by the storage's own library on a thread."""

    def __init__(self, model: nn.Module, folder: Path, url: str, **settings: Any) -> None:
        super().__init__(model, folder, **settings)
        self._url = url
        self._before: Path | None = None
        self._pool: Executor = ThreadPoolExecutor(1)
        self._upload: Future[None] | None = None

    def begin(self) -> None:
        snapshot = kept_in(self.run)
        self._upload = self._pool.submit(plain_upload, snapshot, self._url, self._before)
        self._before = snapshot

    def is_over(self) -> bool:
        if self._upload is None or not self._upload.done():
            return self._upload is None
        self._upload.result()  # raises what it raised
        return True


class ProcessPeer(Peer):
    """The same from a process, which competes for the cores and not for the interpreter's lock."""

    def __init__(self, model: nn.Module, folder: Path, url: str, pool: ProcessPoolExecutor) -> None:
        super().__init__(model, folder, url)
        self._pool = pool


def step_of_torch() -> Callable[[], None]:
    """A step of a small model: short operations that Python calls."""
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    samples, labels = torch.randn(64, 256), torch.randint(10, (64,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(samples), labels).backward()
        optimizer.step()

    return step


def step_of_python() -> Callable[[], None]:
    """A step that wants the interpreter's lock all the time."""

    def step() -> None:
        total = 0
        for number in range(40_000):
            total += number & 7

    return step


STEPS = {"steps of torch": step_of_torch, "steps of pure Python": step_of_python}


def clocks() -> tuple[float, float]:
    """Seconds until now, and those of them in which this thread ran, or waited for a core."""
    queued = int(Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()[1])
    return time.perf_counter(), time.thread_time() + queued / 1e9


def timed_steps(step: Callable[[], None], is_over: Callable[[], bool]) -> tuple[list[float], list[float]]:
    """The seconds of each step until something is over, and those of them in which it waited for a lock."""
    seconds: list[float] = []
    waits: list[float] = []
    looks_at = time.perf_counter() + _LOOKS_EVERY
    while True:
        started, active = clocks()
        step()
        ended, active_since = clocks()
        seconds.append(ended - started)
        waits.append(max(0.0, ended - started - (active_since - active)))
        if ended >= looks_at:
            if is_over():
                return seconds, waits
            looks_at = time.perf_counter() + _LOOKS_EVERY


def measure_steps(folder: Path, size: Size, storage: str, environment: Mapping[str, str]) -> dict[str, Samples]:
    """The `FIGURES` of each round, by kind of step, each in seconds."""
    os.environ.update(environment)
    torch.set_num_threads(1)  # as torchrun does: the other core is for the upload and the server
    model, url = measure.make_model(size.megabytes), place_in(storage, folder)
    steps = {what: make() for what, make in STEPS.items()}
    with measure.fresh_processes(1) as pool:
        contestants = {
            ALONE: Best(model, folder / "alone"),
            OURS: Following(model, folder / "ours", f"{url}/ours"),
            PEER: Peer(model, folder / "peer", f"{url}/peer"),
            PROCESS: ProcessPeer(model, folder / "process", f"{url}/process", pool),
        }
        names = list(contestants)
        found: dict[str, Samples] = {
            f"{what}: {each}": {name: [] for name in names} for what in STEPS for each in FIGURES
        }
        for number in range(1 + size.repetitions):  # one to warm up, with a best for each of the two staging buffers
            turn = number % len(names)
            for what, name in itertools.product(steps, names[turn:] + names[:turn]):
                contestant = contestants[name]
                measure.settle_disk()
                started = time.perf_counter()
                contestant.act()
                stall = time.perf_counter() - started
                contestant.settle()
                contestant.begin()
                seconds, waits = timed_steps(steps[what], contestant.is_over)
                if name == OURS:
                    contestants[ALONE].seconds = max(sum(seconds), _LEAST_SECONDS)
                if number:
                    values = (statistics.mean(seconds), sum(seconds), sum(waits), max(waits), stall)
                    for each, value in zip(FIGURES, values, strict=True):
                        found[f"{what}: {each}"][name].append(value)
        for contestant in contestants.values():
            contestant.end()
    return found


class Closing(Action):
    """The last best of a run, and its end, each time of a new run."""

    def __init__(self, model: nn.Module, folder: Path, url: str | None, *, follows: bool) -> None:
        self._model = model
        self._runs = (folder / str(number) for number in itertools.count())
        self._url = url
        self._follows = follows
        self._keeper: BestKeeper | None = None

    def prepare(self) -> None:
        self._run = next(self._runs)
        remote = self._url if self._follows else None
        self._keeper = BestKeeper(self._model, directory=self._run, metric_key="loss/val", remote=remote)
        self._keeper.start()

    def act(self) -> None:
        self._keeper.observe(1.0, TrainingIteration(update=1))
        self._keeper.close()
        if self._url is not None and not self._follows:
            plain_upload(kept_in(self._run), self._url)

    def settle(self) -> None:
        shutil.rmtree(self._run)
        if self._url is not None:
            filesystem, path = opened(self._url)
            filesystem.rm(path, recursive=True)


def measure_ends(folder: Path, size: Size, storage: str, environment: Mapping[str, str]) -> Samples:
    os.environ.update(environment)
    torch.set_num_threads(1)
    model, url = measure.make_model(size.megabytes), place_in(storage, folder)
    contestants = {
        ALONE: Closing(model, folder / "alone", None, follows=False),
        OURS: Closing(model, folder / "ours", f"{url}/ours", follows=True),
        PEER: Closing(model, folder / "peer", f"{url}/peer", follows=False),
    }
    return measure.alternate(contestants, size.repetitions)


def measure_memory(folder: Path, size: Size, name: str, storage: str, environment: Mapping[str, str]) -> float:
    """The megabytes by which the process grows at most, from the first best of a run until it is uploaded."""
    os.environ.update(environment)
    model = measure.make_model(size.megabytes)
    make: dict[str, Callable[..., Best]] = {ALONE: Best, OURS: Following, PEER: Peer}
    where = {} if name == ALONE else {"url": f"{place_in(storage, folder)}/{name.split(maxsplit=1)[0]}"}
    contestant = make[name](model, folder / "run", **where, async_save=False)  # no staging buffers
    before = measure.resident()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest
    contestant.act()
    contestant.begin()
    while not contestant.is_over():
        time.sleep(_LOOKS_EVERY)
    growth = (measure.resident("VmHWM") - before) / 1e6
    contestant.end()
    return growth


def report_steps(report: Report, storage: str, what: str, samples: dict[str, Samples]) -> None:
    means, lengths, waits, longest = (samples[f"{what}: {each}"] for each in FIGURES[:-1])
    names = (OURS, PEER, PROCESS)
    value = measure.ratio(means, OURS, PEER)
    figures = measure.figures(means, *names, ALONE, scale=1e3, unit="ms")
    bar = ("at most 1.1 x beside a plain upload", 1.1)
    report.add(Line(f"{what} during an upload, {storage}", value, *bar, detail=figures))
    value = measure.ratio(means, OURS, ALONE)
    report.add(Line("the same, beside no upload", value, detail="upload: " + measure.figures(lengths, *names)))
    usual = statistics.median(means[ALONE])
    lost = {
        name: [length * (1 - usual / mean) for length, mean in zip(lengths[name], means[name], strict=True)]
        for name in names
    }
    value = statistics.median(lost[OURS])
    report.add(Line("training time lost by the upload", value, unit="s", detail=measure.figures(lost, *names)))
    value = statistics.median(waits[OURS])
    report.add(Line("of it, waiting for a lock", value, unit="s", detail=measure.figures(waits, *names, ALONE)))
    value = statistics.median(longest[OURS]) * 1e3
    figures = measure.figures(longest, *names, ALONE, scale=1e3, unit="ms")
    report.add(Line("the longest wait for a lock", value, "at most 20 ms", 20.0, unit="ms", detail=figures))


def report_ends(report: Report, storage: str, samples: Samples) -> None:
    value = measure.ratio(samples, OURS, PEER)
    figures = measure.figures(samples, OURS, PEER, ALONE)
    bar = ("at most 1.25 x save, close, plain upload", 1.25)
    report.add(Line(f"last best until close has returned, {storage}", value, *bar, detail=figures))


def run(quick: bool) -> Report:
    size = Size(24, 1) if quick else Size(250, 7)
    report = Report()
    with s3_server() as environment:
        for storage in STORAGES:
            with measure.scratch() as folder:
                steps = measure.on_ranks(1, measure_steps, folder, size, storage, environment)[0]
            with measure.scratch() as folder:
                ends = measure.on_ranks(1, measure_ends, folder, size, storage, environment)[0]
            report.samples |= {f"{storage}, {what}": samples for what, samples in steps.items()}
            report.samples[f"{storage}, last best and close"] = ends
            for what in STEPS:
                report_steps(report, storage, what, steps)
            stalls = {
                name: [each for what in STEPS for each in steps[f"{what}: stall"][name]] for name in (OURS, ALONE)
            }
            value = measure.ratio(stalls, OURS, ALONE)
            figures = measure.figures(stalls, OURS, ALONE, scale=1e3, unit="ms")
            bar = ("at most 1.1 x without a copy", 1.1)
            report.add(Line(f"stall of a new best, {storage}", value, *bar, detail=figures))
            report_ends(report, storage, ends)
        memory: Samples = {}
        for name in (ALONE, OURS, PEER):
            with measure.scratch() as folder:
                memory[name] = measure.on_ranks(1, measure_memory, folder, size, name, "S3", environment)
        report.samples["S3, memory in MB"] = memory
        figures = measure.figures(memory, *memory, unit="MB")
        report.add(
            Line("memory until it is uploaded, S3", memory[OURS][0], "at most 200 MB", 200.0, unit="MB", detail=figures)
        )
    return report


if __name__ == "__main__":
    measure.main("upload", run)

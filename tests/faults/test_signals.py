"""Signals at any moment of a run in one process, as in a notebook: it continues, and ends as if nothing had happened.

pytest -s tests/faults/test_signals.py --kills 200 --fault-seed 7
"""

from __future__ import annotations

import json
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from keepbest import BestKeeper
from keepbest.errors import KeepBestError
from keepbest.run.verify import verify
from keepbest.saving.job import PendingSnapshot
from tests.faults.disks import bare_file_system
from tests.faults.filled_run import COMPLETE, go_on, keeper_of, net, recorded_state, refs_hold, refs_of
from tests.kit.files import Operation, SteppedFiles, before
from tests.kit.runs import Run, saved_at
from tests.kit.seams import use
from tests.saving.gate import Gate

KINDS = {
    "sync": {},
    "async": {"async_save": True},
    "dcp": {"format": "dcp"},
    "dcp in the background": {"format": "dcp", "async_save": True},
    "safetensors with a copy": {"format": "safetensors", "remote": True},
    "async with a copy": {"async_save": True, "remote": True},
    "bare file system": {"is_bare": True},
    "async on a bare file system": {"is_bare": True, "async_save": True},
}


class HandlerError(Exception):
    """What a signal handler of the user raises."""


def raise_error(number, frame):
    raise HandlerError


def leave(number, frame):
    sys.exit(1)


HANDLERS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: leave,
    signal.SIGUSR1: raise_error,
}
# A listing of a folder that was interrupted leaves its iterator to the collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
INTERRUPTIONS = (KeyboardInterrupt, SystemExit, HandlerError, KeepBestError)


@contextmanager
def interrupted(number: signal.Signals, after: float) -> Iterator[None]:
    """The main thread gets a signal after so many seconds, unless the block has ended by then."""
    is_over = False

    def handle(*arguments):
        if not is_over:
            HANDLERS[number](*arguments)

    before = signal.signal(number, handle)
    timer = threading.Timer(after, signal.pthread_kill, [threading.main_thread().ident, number])
    timer.start()
    try:
        yield
    finally:
        is_over = True
        timer.cancel()
        timer.join()
        signal.signal(number, before)


def train(directory: Path, chance: random.Random, interruptions: int, **settings) -> Counter[str]:
    """A run that is interrupted so often. Each time the same keeper continues, or another one resumes."""
    if settings.get("remote"):
        settings["remote"] = directory.with_name("copy").as_uri()
    model, seen, longest = net(), Counter(), 0.02
    keeper = keeper_of(directory, model, **settings)
    while True:
        is_left_alone = seen.total() >= interruptions
        started = time.monotonic()
        try:
            with interrupted(chance.choice(list(HANDLERS)), 60.0 if is_left_alone else chance.uniform(0.0, longest)):
                keeper.start()
                go_on(keeper, model)
                keeper.flush(pin="resume")
                keeper.close()
        except INTERRUPTIONS as interruption:
            # What a rank raises is raised as an error of that rank, or of the step that it was in.
            if isinstance(interruption, KeepBestError) and not _stems_from_handler(interruption):
                raise
            seen[type(interruption).__name__] += 1
        else:
            if is_left_alone:
                return seen
            longest = time.monotonic() - started  # too late: what is left to do takes less
        if chance.random() < 0.5 or keeper.state.last_iteration == COMPLETE.last_iteration:
            keeper.abandon()
            keeper = keeper_of(directory, model, resume="ledger", **settings)


def _stems_from_handler(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, HandlerError):
        error = error.__cause__
    return error is not None


@pytest.fixture
def counted(request):
    counts = Counter()
    yield counts
    print(f"\n{request.node.name}: {counts}")


@pytest.mark.parametrize("kind", KINDS)
def test_signals_at_any_moment_lose_and_repeat_nothing(kind, counted, tmp_path, request):
    interruptions = max(4, 1 + request.config.getoption("--kills") // len(KINDS))
    chance = random.Random(f"{request.config.getoption('--fault-seed')} {kind}")
    number = 0
    while counted.total() < interruptions:
        directory = tmp_path / str(number) / "run"
        settings, left = dict(KINDS[kind]), min(5, interruptions - counted.total())
        with bare_file_system() if settings.pop("is_bare", False) else nullcontext():
            counted += train(directory, chance, left, **settings)
        text = (directory / "checkpoints/ledger.jsonl").read_text()
        lines = [line for line in map(json.loads, text.splitlines()) if line["event"] == "observation"]
        assert [line["iteration"] for line in lines] == [f"E{epoch}" for epoch in range(1, 10)]
        assert not any("lost" in line for line in lines)
        assert verify(directory) == []
        assert refs_hold(directory) == refs_of(COMPLETE)
        assert recorded_state(directory) == COMPLETE
        number += 1


@pytest.mark.parametrize("file_format", ["torch", "dcp"])
@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_interruption_of_a_large_save_arrives_as_what_it_is(file_format, interruption, tmp_path):
    """torch finishes the file on its way out, fails at that, and would raise an error of its own instead."""
    sevens = torch.full((100,), 7.0).numpy().tobytes()

    def interrupt(operation: Operation) -> None:
        if operation.name == "write" and sevens in bytes(operation.data):
            raise interruption(5)

    model = nn.Linear(2100, 2100)  # larger than what is made in memory first
    nn.init.constant_(model.weight, 7.0)
    with use(tmp_path, files=SteppedFiles(before(interrupt))):
        keeper = BestKeeper(model, directory=tmp_path, metric_key="loss", format=file_format)
        with pytest.raises(interruption):
            keeper.observe(1.0, epoch=1)
        nn.init.zeros_(model.weight)
        assert keeper.observe(1.0, epoch=1).is_new_best
        keeper.close()
    assert verify(tmp_path) == []


def test_handler_may_flush_while_a_best_is_given_up(tmp_path, monkeypatch):
    gate, take, flushed = Gate("model.pt"), PendingSnapshot._unwritten, []

    def flush_first(snapshot):
        if threading.current_thread() is threading.main_thread() and not flushed:
            flushed.append(True)
            gate.is_open.set()
            run.keeper.flush()  # waits for the thread, which comes to what is given up
        return take(snapshot)

    with use(tmp_path, files=SteppedFiles(before(gate))):
        run = Run(tmp_path, async_save=True)
        with run.keeper:
            run.observe(3.0)
            assert gate.is_reached.wait(30)
            run.observe(2.0, first=2)
            # A signal comes when it is decided that the queued best is given up, which only a mock can time.
            monkeypatch.setattr(PendingSnapshot, "_unwritten", flush_first)
            run.observe(1.0, first=3)
    assert flushed
    assert (run.keeper.best_metric_value, saved_at(tmp_path, "best_model.loss")) == (1.0, 3)
    assert verify(tmp_path) == []


class LockThatASignalFollows:
    """A lock that calls `handle` when training takes it for the first time."""

    def __init__(self, lock, handle):
        self.lock, self.handle, self.is_handled = lock, handle, False

    def __enter__(self):
        self.lock.acquire()
        if threading.current_thread() is threading.main_thread() and not self.is_handled:
            self.is_handled = True
            self.handle()

    def __exit__(self, *_):
        self.lock.release()


def test_handler_may_flush_while_a_copy_learns_of_a_best(tmp_path):
    run = Run(tmp_path / "run", remote=(tmp_path / "copy").as_uri())
    with run.keeper as keeper:
        mirror = keeper._run.folder.copy._mirror
        mirror._lock = lock = LockThatASignalFollows(mirror._lock, lambda: keeper.flush(pin="handler"))
        run.observe(1.0)
    assert lock.is_handled
    assert verify(tmp_path / "copy") == verify(tmp_path / "run") == []
    ledgers = [(tmp_path / place / "checkpoints" / "ledger.jsonl").read_bytes() for place in ("run", "copy")]
    assert ledgers[0] == ledgers[1]
    assert (tmp_path / "copy/checkpoints/snapshots/U1/model.pt").is_file()


def test_training_holds_no_lock_that_its_writer_needs(tmp_path):
    run, handled = Run(tmp_path / "run", remote=(tmp_path / "copy").as_uri(), async_save=True), []
    with run.keeper as keeper:
        mirror = keeper._run.folder.copy._mirror
        mirror._lock = LockThatASignalFollows(mirror._lock, lambda: handled.append(True))
        run.observe(3.0, 2.0, 1.0)
        assert handled == []  # which is before the writer is drained
    assert (tmp_path / "copy/checkpoints/snapshots/U3/model.pt").is_file()

"""Ctrl-C, or a signal handler, between any two lines of keepbest: nothing is lost or recorded twice.

A trace function raises, or uses the keeper and returns, at one line that is executed after another, as a signal handler
of Python would. That of Lightning for SLURM saves a checkpoint, and training continues until the job is ended.
"""

from __future__ import annotations

import errno
import itertools
import json
import linecache
import math
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from torch import nn

import keepbest
from keepbest import BestKeeper, TrainingIteration
from keepbest.capture.share import Items
from keepbest.errors import RankFailedError, StorageError
from keepbest.modules.parts import Part
from keepbest.ranks import Ranks
from keepbest.run.layout import LEDGER, ledger_path
from keepbest.run.verify import verify
from keepbest.saving.resume_saver import ResumeSaver
from tests.faults.filled_run import COMPLETE, VALUES, go_on, keeper_of, net, recorded_state, refs_hold, refs_of
from tests.kit.files import Operation, Step, SteppedFiles, before, without_waiting
from tests.kit.seams import use

# A listing of a folder that was interrupted leaves its iterator to the collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
PACKAGE = str(Path(keepbest.__file__).parent)
IN_LEDGER = f"{PACKAGE}/run/ledger.py"


class Interruption(KeyboardInterrupt):
    """What the signal handler raises."""


class Interrupter:
    """Interrupts line number `at` that this thread executes in keepbest while it is `armed`; counts the lines."""

    within = PACKAGE

    def __init__(self, at: int = -1) -> None:
        self.at = at
        self.lines = 0
        self.place = ""
        self._withs: set[tuple[int, int]] = set()

    def __enter__(self) -> Interrupter:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame, event, arg):
        return self._line if frame.f_code.co_filename.startswith(self.within) else None

    def _line(self, frame, event, arg):
        if event != "line" or self._is_end_of_with(frame):
            return self._line
        self.lines += 1
        if self.lines - 1 == self.at:
            self.place = f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_lineno}"
            self.interrupt()
        return self._line

    def interrupt(self) -> None:
        raise Interruption

    def _is_end_of_with(self, frame) -> bool:
        """Whether a block ends here that Python leaves in one step: no signal comes between."""
        place = (id(frame), frame.f_lineno)
        is_with = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with ")
        is_end = is_with and place in self._withs
        self._withs ^= {place} if is_with else set()
        return is_end


class Flusher(Interrupter):
    """Flushes the keeper at this line, and lets it continue."""

    def __init__(self, at: int, keeper: BestKeeper | None = None) -> None:
        super().__init__(at)
        self.keeper = keeper

    def interrupt(self) -> None:
        self.keeper.flush(pin="handler")


class Refused(Flusher):
    """Flushes the keeper at this line, which the disk refuses, and lets it continue."""

    within = IN_LEDGER
    is_refused = False

    def interrupt(self) -> None:
        self.is_refused = True
        with pytest.raises(StorageError):
            super().interrupt()
        self.is_refused = False

    def look(self, operation: Operation) -> None:
        if self.is_refused and operation.name in ("write", "truncate") and operation.path.name == LEDGER:
            raise OSError(errno.ENOSPC, "disk full")


class Mover(Flusher):
    """Flushes the keeper at this line, and moves the ledger away before it continues."""

    within = IN_LEDGER

    def interrupt(self) -> None:
        super().interrupt()
        ledger = ledger_path(self.keeper.directory)
        ledger.rename(ledger.with_suffix(".away"))


class Alarm(Interrupter):
    """As a handler of `signal.alarm` often does."""

    within = IN_LEDGER

    def interrupt(self) -> None:
        raise TimeoutError("of the handler")


@pytest.fixture
def memory_folder(tmp_path):
    """Where hundreds of runs do not wait for a disk."""
    shared_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else tmp_path) as folder:
        yield Path(folder)


def observe_again(keeper, model, epoch: int) -> None:
    """What a notebook does with the cell that was interrupted."""
    if keeper.state.last_iteration.epoch == epoch:
        return  # all of the call was done, except its return
    outcome = keeper.observe(VALUES[epoch - 1], TrainingIteration(epoch=epoch))
    assert (outcome.iteration.epoch, outcome.is_new_best) == (epoch, epoch in (1, 2, 5, 8))


def one_run(directory: Path, epoch: int, interrupter: Interrupter, *, then: str, **settings) -> bool:
    """A run whose call of `observe` at `epoch` is interrupted; returns whether it was."""
    model = net()
    keeper = keeper_of(directory, model, **settings)
    go_on(keeper, model, VALUES[: epoch - 1])
    model.weight.data.fill_(float(epoch))
    was_interrupted = False
    try:
        with interrupter:
            keeper.observe(VALUES[epoch - 1], TrainingIteration(epoch=epoch))
    except Interruption:
        was_interrupted = True
    if not was_interrupted:
        keeper.abandon()
        return False
    if then == "resume":
        keeper.abandon()
        keeper = keeper_of(directory, model, resume="ledger", **settings)
    elif then == "again":
        observe_again(keeper, model, epoch)
    elif then == "flush":
        keeper.flush()
    with keeper:
        go_on(keeper, model)
    return True


def check(directory: Path) -> None:
    text = (directory / "checkpoints/ledger.jsonl").read_text()
    lines = [line for line in map(json.loads, text.splitlines()) if line["event"] == "observation"]
    assert [line["iteration"] for line in lines] == [f"E{epoch}" for epoch in range(1, len(VALUES) + 1)]
    assert not any("lost" in line for line in lines)
    assert verify(directory) == []
    assert refs_hold(directory) == refs_of(COMPLETE)
    assert recorded_state(directory) == COMPLETE


@pytest.mark.parametrize("settings", [{}, {"async_save": True}], ids=["waited for", "in background"])
@pytest.mark.parametrize("then", ["again", "resume", "flush"])
@pytest.mark.parametrize("epoch", [4, 5])  # one that exceeds a tolerance, and a new best
def test_interrupt_at_any_line_of_observe_loses_nothing(epoch, then, settings, memory_folder, request):
    everything = request.config.getoption("--crash-points") == "all"
    step = 7 if everything else 199 if request.config.getoption("--quick") else 61
    at, tried = random.Random(f"{request.config.getoption('--fault-seed')} {then}").randrange(step), 0
    while True:
        directory = memory_folder / str(at)
        interrupter = Interrupter(at)
        with use(directory, files=SteppedFiles(without_waiting)):
            if not one_run(directory, epoch, interrupter, then=then, **settings):
                break
            try:
                check(directory)
            except BaseException:
                print(f"interrupted at line {at}, {interrupter.place}")
                raise
        shutil.rmtree(directory)
        tried += 1
        at += step
    print(f"{tried} of {at} lines")
    assert tried


@pytest.mark.parametrize("settings", [{}, {"async_save": True}], ids=["waited for", "in background"])
@pytest.mark.parametrize("epoch", [4, 5])
def test_handler_that_flushes_at_any_line_changes_nothing(epoch, settings, memory_folder, request):
    step = 7 if request.config.getoption("--crash-points") == "all" else 61
    for at in itertools.count(random.Random(f"{request.config.getoption('--fault-seed')}").randrange(step), step):
        directory = memory_folder / str(at)
        with use(directory, files=SteppedFiles(without_waiting)):
            model = net()
            keeper = keeper_of(directory, model, **settings)
            go_on(keeper, model, VALUES[: epoch - 1])
            model.weight.data.fill_(float(epoch))
            with Flusher(at, keeper) as handler:
                outcome = keeper.observe(VALUES[epoch - 1], TrainingIteration(epoch=epoch))
            assert (outcome.is_new_best, outcome.newly_exceeded) == (epoch == 5, (1,) if epoch == 4 else ())
            keeper.flush()
            assert verify(directory) == [], f"interrupted at line {at}, {handler.place}"
            go_on(keeper, model)
            keeper.release("handler")
            keeper.close()
            try:
                check(directory)
            except BaseException:
                print(f"interrupted at line {at}, {handler.place}")
                raise
        shutil.rmtree(directory)
        if not handler.place:
            break
    assert at >= step


@contextmanager
def new_best_under_way(directory: Path, step: Step = without_waiting) -> Iterator[tuple[BestKeeper, nn.Module]]:
    """A keeper that is about to observe a new best, in a folder that is removed afterwards."""
    with use(directory, files=SteppedFiles(step)):
        model = net()
        keeper = keeper_of(directory, model)
        go_on(keeper, model, VALUES[:4])
        model.weight.data.fill_(5.0)
        yield keeper, model
        keeper.abandon()


def end_well(keeper: BestKeeper, model: nn.Module) -> None:
    go_on(keeper, model)
    keeper.close()
    check(keeper.directory)


def test_handler_whose_flush_is_refused_damages_nothing(memory_folder):
    for at in itertools.count():
        handler = Refused(at)
        with new_best_under_way(memory_folder / str(at), before(handler.look)) as (keeper, model):
            handler.keeper = keeper
            with handler:
                assert keeper.observe(VALUES[4], TrainingIteration(epoch=5)).is_new_best
            end_well(keeper, model)
        if not handler.place:
            break
    assert at > 20


def test_os_error_of_a_handler_records_nothing_twice(memory_folder):
    for at in itertools.count():
        with new_best_under_way(memory_folder / str(at)) as (keeper, model):
            with suppress(RankFailedError), Alarm(at) as handler:
                keeper.observe(VALUES[4], TrainingIteration(epoch=5))
            observe_again(keeper, model, 5)
            end_well(keeper, model)
        if not handler.place:
            break
    assert at > 20


def test_ledger_that_goes_after_a_commit_takes_no_best_away(memory_folder):
    for at in itertools.count():
        with new_best_under_way(memory_folder / str(at)) as (keeper, _):
            with suppress(RankFailedError), Mover(at, keeper) as handler:
                keeper.observe(VALUES[4], TrainingIteration(epoch=5))
            if not handler.place:
                break
            ledger = ledger_path(keeper.directory)
            ledger.with_suffix(".away").rename(ledger)
            assert [fault for fault in verify(keeper.directory) if fault.kind == "damage"] == [], handler.place
    assert at > 20


def save_best(keeper: BestKeeper, saver: ResumeSaver) -> None:
    assert keeper.observe(1.0, epoch=2).is_new_best


def save_checkpoint(keeper: BestKeeper, saver: ResumeSaver) -> None:
    saver.save(TrainingIteration(epoch=2))


@pytest.mark.parametrize("file_format", ["torch", "dcp"])
@pytest.mark.parametrize("save", [save_best, save_checkpoint])
def test_handler_that_flushes_at_any_write_leaves_it_whole(save, file_format, tmp_path):
    seen = math.inf  # operations

    def look(operation: Operation) -> None:
        nonlocal seen
        seen += 1
        if seen == at:
            keeper.flush(pin="handler")

    for at in itertools.count(1):
        directory = tmp_path / str(at)
        with use(directory, files=SteppedFiles(before(look))):
            model = net()
            keeper = BestKeeper(model, directory=directory, metric_key="loss", format=file_format)
            keeper.observe(2.0, epoch=1)
            saver = ResumeSaver(directory, Items(model, (Part("model", ""),), True), Ranks.connect(), keep_last=1)
            saver.start(TrainingIteration(epoch=1), None)
            seen = 0
            save(keeper, saver)
            is_over, seen = seen < at, math.inf
            keeper.flush()
            assert verify(directory) == [], f"before operation {at}"
            saver.leave()
            keeper.abandon()
        if is_over:
            break
    assert at > 10

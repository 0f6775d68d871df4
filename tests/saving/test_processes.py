"""Keepers that are forked, dropped, interrupted, or left behind in a notebook, and threads that cannot be started."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
from torch import nn

import keepbest
from keepbest import BestKeeper
from keepbest.errors import ConfigError, RunExistsError
from keepbest.run.lock import RunLock
from keepbest.run.verify import verify
from keepbest.saving.open_run import OpenRun
from tests.kit.child import in_forked_child
from tests.kit.files import SteppedFiles, before
from tests.kit.runs import Run, ledger, refs, snapshots, update
from tests.kit.seams import use
from tests.kit.toys import make_trainer
from tests.saving.gate import Gate

BEST = "best_model.loss"
FORKING = """
import gc, json, os, sys, torch
from keepbest import BestKeeper, KeepBestError, TrainingIteration
directory, settings = sys.argv[1], json.loads(sys.argv[2])
keeper = BestKeeper(torch.nn.Linear(1000, 1000), directory=directory, metric_key="loss", **settings)
has_saved, saved = os.pipe()
children = []
with keeper:
    keeper.observe(1.0, TrainingIteration(epoch=1))
    for way in ("exit", "leave the block"):
        if (child := os.fork()) == 0:
            os.read(has_saved, 1)
            for use in (keeper.start, keeper.flush, lambda: keeper.observe(0.1, epoch=2), lambda: keeper.release("x")):
                try:
                    use()
                    print("used")
                except KeepBestError as error:
                    print(type(error).__name__, str(error))
            if way == "exit":
                sys.exit()
            break
        children.append(child)
    if child:
        keeper.observe(0.5, TrainingIteration(epoch=2))
        keeper.flush()
        os.write(saved, b"..")
        print("ended with", [os.waitpid(child, 0)[1] for child in children])
        keeper.observe(0.7, TrainingIteration(epoch=3))
if not child:
    keeper.abandon()
    del keeper
    gc.collect()
"""


@pytest.mark.parametrize("settings", ["{}", '{"async_save": true, "remote": "file://%s-copy"}'], ids=["plain", "all"])
def test_forked_child_changes_nothing_however_it_ends(tmp_path, settings):
    directory = tmp_path / "run"
    settings = settings.replace("%s", str(directory))
    arguments = [sys.executable, "-c", FORKING, str(directory), settings]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=True)
    assert (ended.stdout.count("was forked from process"), ended.stdout.count("used\n")) == (8, 0)
    assert "ended with [0, 0]" in ended.stdout
    assert ended.stderr == ""
    assert verify(directory) == []
    seen = [line["iteration"] for line in ledger(directory) if line["event"] == "observation"]
    assert (seen, snapshots(directory), ledger(directory)[-1]["event"]) == (["E1", "E2", "E3"], {"E2"}, "end")


def test_run_that_a_forked_child_opens_first_is_its_own(tmp_path):
    run = Run(tmp_path)

    def keep() -> None:
        run.observe(1.0)
        run.keeper.close()

    assert in_forked_child(keep) == 0
    assert refs(tmp_path) == {BEST: "U1"}
    with pytest.raises(RunExistsError, match="resume it"):
        run.keeper.start()


def is_free(directory: Path) -> bool:
    """Whether another process could have the folder, which may not be there yet."""

    def take() -> None:
        (directory / "checkpoints").mkdir(exist_ok=True)
        lock = RunLock(directory / "checkpoints" / "lock")
        lock.acquire()
        lock.release()

    return in_forked_child(take) == 0


def comes_true(condition) -> bool:
    deadline = time.monotonic() + 60
    while not (reached := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)  # garbage collection and other processes do it, and report nothing
    return reached


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def refused_threads(monkeypatch):
    """Names of threads that cannot be started."""
    start, names = threading.Thread.start, set()

    def refuse(thread):
        if thread.name in names:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    return names


def test_dropped_keeper_is_released_once_its_saves_are_written(tmp_path):
    gate, held = Gate("snapshot.json"), open_files()
    with use(tmp_path, files=SteppedFiles(before(gate))):
        run = Run(tmp_path, async_save=True)
        run.observe(1.0)
        run.model.keeper = run.keeper  # a cycle through what is to be saved, which only the collector finds
        assert gate.is_reached.wait(30)
        del run
        gate.is_open.set()
        assert comes_true(lambda: gc.collect() is not None and is_free(tmp_path))
    assert verify(tmp_path) == []
    assert refs(tmp_path) == {BEST: "U1"}
    assert comes_true(lambda: not any(thread.name.startswith("keepbest") for thread in threading.enumerate()))
    assert open_files() == held


def test_next_keeper_waits_for_one_that_was_dropped(tmp_path, refused_threads):
    refused_threads.add("keepbest-release")
    run = Run(tmp_path, async_save=True)
    run.observe(1.0)
    del run.keeper
    with pytest.raises(RunExistsError, match="resume it"):
        Run(tmp_path).keeper.start()
    with Run(tmp_path, resume="ledger").keeper as resumed:
        assert resumed.best_metric_value == 1.0
    assert is_free(tmp_path)


@pytest.mark.parametrize("way", ["close", "abandon"])
def test_folder_is_free_after_an_interrupt_while_a_keeper_leaves(tmp_path, way):
    gate = Gate("snapshot.json")
    with use(tmp_path, files=SteppedFiles(before(gate))):
        run = Run(tmp_path, async_save=True)
        run.observe(1.0)
        assert gate.is_reached.wait(30)
        interrupt = partial(signal.pthread_kill, threading.main_thread().ident, signal.SIGINT)
        for delay in (0.2, 0.4) if way == "close" else (0.2,):  # it waits for its own saves, then for all of the run
            threading.Timer(delay, interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            getattr(run.keeper, way)()
        assert not is_free(tmp_path)  # the thread still writes
        gate.is_open.set()
        assert comes_true(lambda: is_free(tmp_path))
    assert refs(tmp_path) == {BEST: "U1"}
    with Run(tmp_path, resume="ledger").keeper as resumed:
        assert resumed.best_metric_value == 1.0


def test_keeper_interrupted_while_it_left_can_start_again(tmp_path, monkeypatch):
    run = Run(tmp_path)
    (tmp_path / "checkpoints").write_text("in the way")
    with monkeypatch.context() as patch:
        patch.setattr(OpenRun, "leave", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.keeper.start()
    (tmp_path / "checkpoints").unlink()
    with run.keeper:
        run.observe(1.0)
    assert refs(tmp_path) == {BEST: "U1"}
    assert is_free(tmp_path)


CELL = """
keeper = BestKeeper(model, directory=directory, metric_key="loss", **settings)
for epoch in range(first, 4):
    keeper.observe(1.0 / epoch, epoch=epoch)
    if epoch == stop:
        raise KeyboardInterrupt
keeper.close()
"""
FUNCTION = "def train():\n" + "\n".join(f"    {line}" for line in CELL.splitlines()) + "\ntrain()"


def call_in(error: BaseException) -> str:
    return re.search(r"keepbest\.abandon\('.*'\)", str(error)).group()


def test_interrupted_cell_can_be_run_again(tmp_path):
    cell = {"BestKeeper": BestKeeper, "model": nn.Linear(1, 1), "directory": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        exec(CELL, cell | {"settings": {"async_save": True}, "first": 1, "stop": 2})
    with pytest.raises(RunExistsError, match="resume='ledger'"):
        exec(CELL, cell | {"settings": {}, "first": 1, "stop": None})
    exec(CELL, cell | {"settings": {"resume": "ledger"}, "first": 3, "stop": None})
    assert refs(tmp_path) == {BEST: "E3.r1"}


def test_keeper_that_a_traceback_holds_is_released_as_said(tmp_path):
    cell = {"BestKeeper": BestKeeper, "model": nn.Linear(1, 1), "directory": tmp_path}
    with pytest.raises(KeyboardInterrupt) as last:  # as `sys.last_traceback` does
        exec(FUNCTION, cell | {"settings": {"async_save": True}, "first": 1, "stop": 2})
    rest = {"settings": {"resume": "ledger"}, "first": 3, "stop": None}
    with pytest.raises(ConfigError, match="two keepers of this run are named") as refused:
        exec(FUNCTION, cell | rest)
    eval(call_in(refused.value))
    exec(FUNCTION, cell | rest)
    assert refs(tmp_path) == {BEST: "E3.r1"}
    del last


def test_abandon_ends_every_keeper_in_the_directory_alone(tmp_path):
    here = [BestKeeper(nn.Linear(1, 1), directory=tmp_path / "a", metric_key=f"loss/{name}") for name in "ab"]
    other = BestKeeper(nn.Linear(1, 1), directory=tmp_path / "b", metric_key="loss")
    for keeper in (*here, other):
        keeper.observe(1.0, update(1))
    for _ in range(2):
        keepbest.abandon(tmp_path / "a")
    for keeper in here:
        with pytest.raises(ConfigError, match="is closed"):
            keeper.observe(0.5, update(2))
    assert other.observe(0.5, update(2)).is_new_best
    assert [is_free(tmp_path / name) for name in "ab"] == [True, False]
    other.close()


@pytest.mark.parametrize(
    ("thread", "settings"), [("keepbest-writer", {"async_save": True}), ("keepbest-upload", {"remote": "memory://{}"})]
)
def test_thread_that_cannot_start_is_an_error_before_training(tmp_path, refused_threads, thread, settings):
    settings = {name: each if each is True else each.format(tmp_path) for name, each in settings.items()}
    refused_threads.add(thread)
    with pytest.raises(ConfigError, match=f"the thread {thread} cannot be started"):
        Run(tmp_path, **settings).keeper.start()
    assert is_free(tmp_path)
    assert ledger(tmp_path) == [] if (tmp_path / "checkpoints" / "ledger.jsonl").exists() else True
    refused_threads.clear()
    with Run(tmp_path, **settings).keeper as keeper:
        keeper.observe(1.0, update(1))
    assert refs(tmp_path) == {BEST: "U1"}


EXITING = """
import atexit, sys

def observe_late():
    try:
        keeper.observe(0.2, epoch=4)
    except Exception as error:
        print("refused:", error)

def close_late():
    try:
        keeper.close()
    except Exception as error:
        print("refused:", error)
    observe_late()

if sys.argv[2] == "before the import":
    atexit.register(close_late)
import torch
from keepbest import BestKeeper
if sys.argv[2] == "after the import":
    atexit.register(close_late)
    atexit.register(lambda: keeper.observe(0.3, epoch=3))
settings = {"async_save": sys.argv[3] == "async", "tolerances": [5]}
keeper = BestKeeper(torch.nn.Linear(1000, 1000), directory=sys.argv[1], metric_key="loss", **settings)
for epoch, value in enumerate((1.0, 0.5), start=1):
    keeper.observe(value, epoch=epoch)
"""


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("registered", ["before the import", "after the import"])
def test_function_at_exit_uses_the_keeper_or_is_refused(registered, mode, tmp_path):
    arguments = [sys.executable, "-c", EXITING, str(tmp_path), registered, mode]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=True)
    if registered == "after the import":
        assert ended.stdout == "refused: the keeper of loss is closed\n"
        assert refs(tmp_path) == {BEST: "E3", f"{BEST}.tolerance=5": "E3"}
    else:
        assert ended.stdout.count(f"refused: the interpreter exits, and has released {tmp_path}") == 2
        assert refs(tmp_path) == {BEST: "E2"}
    assert ended.stderr == ""
    assert verify(tmp_path) == []


def test_copy_of_a_keeper_is_refused_with_what_to_do(tmp_path):
    run = Run(tmp_path)
    run.model.keeper = run.keeper
    for copied in (partial(copy.copy, run.keeper), partial(copy.deepcopy, run.model), partial(pickle.dumps, run.model)):
        with pytest.raises(TypeError, match=r"hold it outside of what is copied .* hand its state_dict"):
            copied()
    assert run.observe(1.0)[0].is_new_best


def interrupt(**_):
    raise KeyboardInterrupt


def test_interrupted_trainer_can_train_again_in_its_process(tmp_path, monkeypatch):
    callbacks = [
        {"name": "OfflineLossCallback", "dataset_key": "val", "every_n_epochs": 1},
        {"name": "BestCheckpointCallback", "metric_key": "loss/val/total", "every_n_epochs": 1},
    ]
    trainer = make_trainer(tmp_path, callbacks=callbacks)
    monkeypatch.setattr(trainer.callbacks[1], "after_training", interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with pytest.raises(ConfigError, match="two keepers of this run are named") as refused:
        make_trainer(tmp_path, callbacks=callbacks, resume="auto").train()
    eval(call_in(refused.value))
    make_trainer(tmp_path, callbacks=callbacks, resume="auto").train()
    assert refs(tmp_path).keys() == {"best_model.loss.val.total"}
    assert is_free(tmp_path)

"""Saves in the background: what is told when, what is waited for, and what may be skipped."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from keepbest.decision import Best
from keepbest.errors import ConfigError, RankFailedError, StorageError
from keepbest.run.folder import RunFolder
from keepbest.run.verify import verify
from keepbest.staging.host import HostSlot
from tests.kit.files import Operation, SteppedFiles, before
from tests.kit.models import WithState
from tests.kit.pool import run_ranks
from tests.kit.runs import Run, ledger, refs, saved_at, set_weights, update
from tests.kit.seams import use
from tests.saving.gate import Gate

REF = "best_model.loss"


def refusing(directory: Path, *snapshots: str):
    """Refuses to make the files of some snapshots, as a full disk would."""

    def refuse(operation: Operation) -> None:
        if operation.name == "create" and operation.path.parent.name.removeprefix(".tmp-") in snapshots:
            raise OSError(28, "No space left on device")

    return use(directory, files=SteppedFiles(before(refuse)))


class SlowDisk:
    """Does not get on with a snapshot before it is let go."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()
        self.has_begun = threading.Event()

    def __call__(self, operation: Operation) -> None:
        if operation.name == "create":
            self.has_begun.set()
            assert self.may_go_on.wait(30)


@pytest.fixture
def disk(tmp_path):
    slow = SlowDisk()
    with use(tmp_path, files=SteppedFiles(before(slow))):
        yield slow


def told_at(directory: Path, call: str) -> str:
    with refusing(directory, "U2"):
        run = Run(directory, async_save=True)
        run.observe(5.0)
        run.keeper.flush()
        assert run.observe(4.0, first=2)[0].is_new_best
        calls = {
            "observe": partial(observe_until_it_is_told, run),
            "flush": run.keeper.flush,
            "close": run.keeper.close,
        }
        with pytest.raises(StorageError) as caught:
            calls[call]()
        run.keeper.abandon()
    return str(caught.value)


def observe_until_it_is_told(run: Run) -> None:
    # The next interval after the failure; how soon that is, the thread decides.
    run.observe(*[9.0] * 10_000, first=3)


@pytest.mark.parametrize("call", ["observe", "flush", "close"])
def test_next_call_tells_every_rank_of_a_save_that_failed(tmp_path, call):
    messages = run_ranks(told_at, 2, tmp_path / "run", call)
    assert len(set(messages)) == 1
    what = r"failed to save the new best of \S+ at U2 on rank 0 of 2: OSError: \[Errno 28\] No space left on device\. "
    assert re.search(what + "Free or repair the storage of the run directory and resume", messages[0])
    assert saved_at(tmp_path / "run", REF) == 1
    assert verify(tmp_path / "run") == []


def test_observation_that_was_not_recorded_is_named_by_the_next(tmp_path):
    def refuse(operation: Operation) -> None:
        if operation.name == "write" and b'"U2"' in bytes(operation.data):
            raise OSError(28, "No space left on device")

    with use(tmp_path / "run", files=SteppedFiles(before(refuse))):
        run = Run(tmp_path / "run")
        run.observe(5.0, 6.0)
        with pytest.raises(
            StorageError, match=r"failed to record U2 of best_model.loss on rank 0 of 1: .*Free or repair"
        ):
            run.observe(7.0, first=3)
        run.keeper.abandon()


def best_after_a_flush_that_raised(directory: Path) -> tuple[str, float]:
    with refusing(directory, "U4"):
        run = Run(directory, async_save=True, tolerances=[0])
        run.observe(5.0)
        run.keeper.flush()
        run.observe(4.0, 4.5, 3.0, first=2)  # the tolerance closes at the second, which is needed from there on
        with pytest.raises(StorageError):
            run.keeper.flush()
        found = run.keeper.best_path.name, run.keeper.best_metric_value
        run.keeper.abandon()
    return found


def test_best_path_is_there_after_a_flush_that_raised(tmp_path):
    assert run_ranks(best_after_a_flush_that_raised, 2, tmp_path / "run") == [("U2", 4.0)] * 2
    assert saved_at(tmp_path / "run", REF) == 2


def go_on_after_a_lost_best(directory: Path) -> list:
    states = []
    with refusing(directory, "U3"):
        run = Run(directory, async_save=True, on_save_error="warn", tolerances=[1, 5])
        with run.keeper as keeper:
            for number, value in enumerate([5.0, 6.0, 1.0, 4.0, 4.5, 4.6], start=1):
                [outcome] = run.observe(value, first=number)
                if number == 3:
                    keeper.flush()  # so that the failure is there, and told
                states.append((outcome.is_new_best, keeper.best_metric_value, keeper.state.tolerance_counter))
    return [states, keeper.state.to_json()]


def test_lost_best_is_taken_back_and_the_next_better_one_saved(tmp_path):
    results = run_ranks(go_on_after_a_lost_best, 2, tmp_path / "run")
    assert results[0] == results[1]
    states, state = results[0]
    # As if the third value had been no improvement: tolerance 1 closes at it, and 4.0 beats 5.0 again.
    assert states == [
        (True, 5.0, 0), (False, 5.0, 1), (True, 5.0, 2), (True, 4.0, 0), (False, 4.0, 1), (False, 4.0, 2),
    ]  # fmt: skip
    assert {tolerance: best["value"] for tolerance, best in state["exceeded"].items()} == {"1": 5.0}
    assert (saved_at(tmp_path / "run", REF), saved_at(tmp_path / "run", f"{REF}.tolerance=1")) == (4, 1)
    assert verify(tmp_path / "run") == []

    with Run(tmp_path / "run", tolerances=[1, 5], resume="ledger").keeper as resumed:
        assert resumed.state.to_json() == state


def test_one_of_the_top_is_the_best_once_the_better_one_is_lost(tmp_path):
    with refusing(tmp_path, "U2"):
        run = Run(tmp_path, async_save=True, on_save_error="warn", keep_top_k=2, tolerances=[5])
        run.observe(5.0, 2.0, 4.0)
        run.keeper.flush()
        assert (run.keeper.best_metric_value, saved_at(tmp_path, REF)) == (4.0, 3)
        run.observe(3.0, first=4)
        run.keeper.close()
    assert {ref: saved_at(tmp_path, ref) for ref in refs(tmp_path)} == {
        REF: 4, f"{REF}.tolerance=5": 4, f"{REF}.top=1": 4, f"{REF}.top=2": 3,
    }  # fmt: skip
    assert verify(tmp_path) == []


def test_tolerance_that_a_lost_best_closes_keeps_the_one_before(tmp_path):
    gate = Gate("model.pt")

    def refuse(operation: Operation) -> None:
        gate(operation)
        if operation.name == "create" and operation.path.parent.name == ".tmp-U2":
            raise OSError(28, "No space left on device")

    gate.is_open.set()
    with use(tmp_path, files=SteppedFiles(before(refuse))):
        run = Run(tmp_path, async_save=True, on_save_error="warn", tolerances=[0])
        run.observe(5.0)
        run.keeper.flush()
        gate.is_reached.clear()
        gate.is_open.clear()
        run.observe(2.0, first=2)
        assert gate.is_reached.wait(30)
        run.observe(1.0, 4.5, first=3)  # which does not know that the second is lost
        gate.is_open.set()
        run.keeper.flush()
        assert run.keeper.state.exceeded == {0: Best(5.0, update(1))}
        assert {ref: saved_at(tmp_path, ref) for ref in refs(tmp_path)} == {REF: 3, f"{REF}.tolerance=0": 1}
        run.keeper.close()
    assert verify(tmp_path) == []


def test_extra_state_is_written_as_it_was_at_the_best(tmp_path, disk):
    run = Run(tmp_path, WithState({"scale": torch.ones(2), "steps": [1]}), async_save=True)
    with run.keeper as keeper:
        run.observe(5.0)
        assert disk.has_begun.wait(30)
        run.model.state["scale"].fill_(7.0)
        run.model.state["steps"].append(2)
        disk.may_go_on.set()
        keeper.flush()
        state = torch.load(keeper.best_path / "model.pt", weights_only=True)["_extra_state"]
    assert (state["scale"].tolist(), state["steps"]) == ([1.0, 1.0], [1])


def test_queued_best_that_nothing_needs_is_skipped(tmp_path, disk):
    run = Run(tmp_path, async_save=True)
    with run.keeper as keeper:
        run.observe(5.0)
        assert disk.has_begun.wait(30)
        # Both buffers are taken at the end: the second best, which was not begun, makes room.
        run.observe(4.0, 4.5, 3.0, first=2)
        disk.may_go_on.set()
        keeper.flush()
        assert saved_at(tmp_path, REF) == 4
    lines = [line for line in ledger(tmp_path) if line["event"] == "observation"]
    assert [(line["iteration"], "snapshot" in line, line.get("superseded", False)) for line in lines] == [
        ("U1", True, False), ("U2", False, True), ("U3", False, False), ("U4", True, False),
    ]  # fmt: skip

    with Run(tmp_path, resume="ledger").keeper as resumed:
        assert resumed.state == keeper.state


def test_skipped_best_counts_only_if_its_successor_was_committed(tmp_path):
    slow = SlowDisk()

    def refuse(operation: Operation) -> None:
        slow(operation)
        if operation.name == "create" and operation.path.parent.name.removeprefix(".tmp-") == "U4":
            raise OSError(28, "No space left on device")

    with use(tmp_path, files=SteppedFiles(before(refuse))):
        run = Run(tmp_path, async_save=True, on_save_error="warn", tolerances=[2, 5])
        with run.keeper as keeper:
            run.observe(5.0)
            assert slow.has_begun.wait(30)
            run.observe(2.0, 4.5, 1.0, first=2)  # the last takes the place of the queued one, and is lost
            slow.may_go_on.set()
            keeper.flush()
            assert (keeper.best_metric_value, keeper.state.tolerance_counter) == (5.0, 3)
            assert run.observe(4.0, first=5)[0].is_new_best
        state = keeper.state
    assert (saved_at(tmp_path, REF), saved_at(tmp_path, f"{REF}.tolerance=2")) == (5, 1)
    with Run(tmp_path, tolerances=[2, 5], resume="ledger").keeper as resumed:
        assert resumed.state == state


def test_best_skipped_for_a_lost_one_counts_not_for_the_next(tmp_path):
    disks = {"U1": SlowDisk(), "U4": SlowDisk()}

    def hold_and_refuse(operation: Operation) -> None:
        name = operation.path.parent.name.removeprefix(".tmp-")
        if name in disks:
            disks[name](operation)
        if operation.name == "create" and name == "U4":
            raise OSError(28, "No space left on device")

    with use(tmp_path, files=SteppedFiles(before(hold_and_refuse))):
        run = Run(tmp_path, async_save=True, on_save_error="warn", tolerances=[2])
        with run.keeper as keeper:
            run.observe(5.0)
            assert disks["U1"].has_begun.wait(30)
            run.observe(2.0, 4.5, 1.0, first=2)  # the last takes the place of the queued one
            disks["U1"].may_go_on.set()
            assert disks["U4"].has_begun.wait(30)
            run.observe(0.5, first=5)  # is queued before anybody knows that the one before it is lost
            disks["U4"].may_go_on.set()
            keeper.flush()
            state = keeper.state
    assert (state.best, state.exceeded) == (Best(0.5, update(5)), {2: Best(5.0, update(1))})
    assert (saved_at(tmp_path, REF), saved_at(tmp_path, f"{REF}.tolerance=2")) == (5, 1)
    with Run(tmp_path, tolerances=[2], resume="ledger").keeper as resumed:
        assert resumed.state == state


def look_only_between_lines(monkeypatch) -> None:
    """Each line takes a while, and whoever reads what is recorded meanwhile, on another thread, fails."""
    # Wrapped and not replaced: no file is touched where the two threads would meet.
    append, catch_up, writing = RunFolder.append, RunFolder.catch_up, []

    def append_slowly(folder, event, **how):
        writing.append(threading.current_thread())
        time.sleep(0.05)  # is the slow disk
        append(folder, event, **how)
        writing.pop()

    def look(folder):
        time.sleep(0.02)  # lets the writer begin, which reports that to nobody
        assert writing in ([], [threading.current_thread()])
        catch_up(folder)

    monkeypatch.setattr(RunFolder, "append", append_slowly)
    monkeypatch.setattr(RunFolder, "catch_up", look)


def test_best_skipped_for_a_failed_capture_does_not_count(tmp_path, disk, monkeypatch):
    look_only_between_lines(monkeypatch)
    run = Run(tmp_path, async_save=True, tolerances=[5])
    with run.keeper as keeper:
        run.observe(5.0)
        assert disk.has_begun.wait(30)
        run.observe(2.0, first=2)
        with monkeypatch.context() as patch:
            patch.setattr(HostSlot, "seal", out_of_memory)
            with pytest.raises(RankFailedError, match="out of memory"):
                run.observe(1.0, first=3)
        disk.may_go_on.set()
        assert [outcome.is_new_best for outcome in run.observe(4.0, 4.5, first=4)] == [True, False]
        state = keeper.state
    assert saved_at(tmp_path, REF) == 4
    with Run(tmp_path, tolerances=[5], resume="ledger").keeper as resumed:
        assert resumed.state == state


def out_of_memory(*_):
    raise RuntimeError("out of memory")


def test_queued_best_that_a_tolerance_names_is_waited_for(tmp_path, disk):
    run = Run(tmp_path, async_save=True, tolerances=[0])
    with run.keeper:
        run.observe(5.0)
        assert disk.has_begun.wait(30)
        assert run.observe(4.0, 4.5, first=2)[1].newly_exceeded == (0,)
        last = threading.Thread(target=run.observe, args=(3.0,), kwargs={"first": 4})
        last.start()
        last.join(0.2)
        assert last.is_alive()
        disk.may_go_on.set()
        last.join(30)
    assert (saved_at(tmp_path, REF), saved_at(tmp_path, f"{REF}.tolerance=0")) == (4, 2)


@pytest.mark.parametrize("is_second_start", [False, True])
def test_later_weights_do_not_reach_a_snapshot_in_progress(is_second_start, tmp_path, disk):
    run = Run(tmp_path, async_save=True)
    if is_second_start:
        (tmp_path / "checkpoints").write_text("in the way")
        with pytest.raises(StorageError):
            run.keeper.start()
        (tmp_path / "checkpoints").unlink()
    with run.keeper:
        run.observe(5.0)
        assert disk.has_begun.wait(30)
        set_weights(run.model, 99)
        disk.may_go_on.set()
    assert saved_at(tmp_path, REF) == 1


def test_keepers_share_a_snapshot_that_is_still_queued(tmp_path):
    first = Run(tmp_path, async_save=True)
    second = Run(tmp_path, first.model, metric_key="loss/other", async_save=True)
    with first.keeper, second.keeper:
        for number in (1, 2):
            first.observe(-number, first=number)
            second.keeper.observe(-number, update(number))
    assert [saved_at(tmp_path, run.keeper.name) for run in (first, second)] == [2, 2]
    assert len(list((tmp_path / "checkpoints/snapshots").iterdir())) == 1


def test_refused_snapshots_keep_no_buffer(tmp_path):
    run = Run(tmp_path, async_save=True)
    weight = run.model.weight
    with run.keeper as keeper:
        for _ in range(3):
            run.model.weight = nn.Parameter(torch.empty(1, 1, device="meta"))
            with pytest.raises(ConfigError, match="meta device"):
                keeper.observe(1.0, update(1))
        run.model.weight = weight
        assert run.observe(1.0)[0].is_new_best
    assert saved_at(tmp_path, REF) == 1


PROGRAM = """
import sys, torch
from keepbest import BestKeeper, TrainingIteration
model = torch.nn.Linear(1000, 1000)
{enter}
    keeper.observe(1.0, TrainingIteration(epoch=1))
    raise RuntimeError("training died")
"""
ENTER = {
    "in a with block": "with BestKeeper(model, directory=sys.argv[1], metric_key='loss', async_save=True) as keeper:",
    "without one": "keeper = BestKeeper(model, directory=sys.argv[1], metric_key='loss', async_save=True)\nif True:",
}


@pytest.mark.parametrize("way", list(ENTER))
def test_process_ended_by_an_exception_leaves_the_best_on_disk(tmp_path, way):
    program = PROGRAM.format(enter=ENTER[way])
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert "RuntimeError: training died" in ended.stderr
    assert (tmp_path / "checkpoints" / REF / "model.pt").exists()
    assert verify(tmp_path) == []

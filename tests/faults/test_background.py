"""Saves in the background: what is told when, what is waited for, and what may be skipped."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from keepbest import BestKeeper, TrainingIteration
from keepbest.errors import SnapshotError, StorageError
from keepbest.run import record as store_module
from keepbest.run.files import DurableFile, Files
from keepbest.run.verify import verify
from tests.kit.pool import run_ranks

REF = "best_model.loss"


class RefusingFiles(Files):
    """Refuses to make the files of some snapshots, as a full disk would."""

    refused: tuple[str, ...] = ()

    def create(self, path: Path) -> DurableFile:
        if path.parent.name.removeprefix(".tmp-") in self.refused:
            raise OSError(28, "No space left on device")
        return super().create(path)


class SlowFiles(Files):
    """Does not get on with a snapshot before it is let go."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()
        self.has_begun = threading.Event()

    def create(self, path: Path) -> DurableFile:
        self.has_begun.set()
        assert self.may_go_on.wait(30)
        return super().create(path)


def keep(directory: Path, **settings: object) -> tuple[BestKeeper, nn.Linear]:
    model = nn.Linear(1, 1, bias=False)
    return BestKeeper(model, directory=directory, metric_key="loss", async_save=True, **settings), model


def observe(keeper: BestKeeper, model: nn.Linear, epoch: int, value: float):
    with torch.no_grad():
        model.weight.fill_(epoch)
    return keeper.observe(value, TrainingIteration(epoch=epoch))


def stamp(directory: Path, ref: str = REF) -> int | None:
    path = directory / "checkpoints" / ref / "model.pt"
    return int(torch.load(path, weights_only=True)["weight"].item()) if path.exists() else None


def ledger(directory: Path) -> list[dict]:
    lines = (directory / "checkpoints/ledger.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == "observation"]


def refuse(*snapshots: str) -> None:
    files = RefusingFiles()
    files.refused = snapshots
    store_module.Files = lambda: files


def told_at(directory: Path, call: str) -> str:
    refuse("E2")
    keeper, model = keep(directory)
    observe(keeper, model, 1, 5.0)
    keeper.flush()
    assert observe(keeper, model, 2, 4.0).is_new_best
    calls = {"observe": partial(observe_until_it_is_told, keeper, model), "flush": keeper.flush, "close": keeper.close}
    with pytest.raises(StorageError) as caught:
        calls[call]()
    keeper.abandon()
    return str(caught.value)


def observe_until_it_is_told(keeper: BestKeeper, model: nn.Linear) -> None:
    # The next interval after the failure; how soon that is, the thread decides.
    for epoch in range(3, 10_000):
        observe(keeper, model, epoch, 9.0)


@pytest.mark.parametrize("call", ["observe", "flush", "close"])
def test_next_call_tells_every_rank_of_a_save_that_failed(tmp_path, call):
    messages = run_ranks(told_at, 2, tmp_path / "run", call)
    assert len(set(messages)) == 1
    assert "rank 0 of 2: OSError: [Errno 28] No space left on device" in messages[0]
    assert stamp(tmp_path / "run") == 1
    assert verify(tmp_path / "run") == []


def go_on_after_a_lost_best(directory: Path) -> list:
    refuse("E3")
    keeper, model = keep(directory, on_save_error="warn", tolerances=[1, 5])
    states = []
    with keeper:
        for epoch, value in enumerate([5.0, 6.0, 1.0, 4.0, 4.5, 4.6], start=1):
            outcome = observe(keeper, model, epoch, value)
            if epoch == 3:
                keeper.flush()  # so that the failure is there, and told
            states.append((outcome.is_new_best, keeper.best_metric_value, keeper.state.tolerance_counter))
    return [states, keeper.state.to_json()]


def test_lost_best_is_taken_back_on_every_rank_and_the_next_better_one_saved(tmp_path):
    results = run_ranks(go_on_after_a_lost_best, 2, tmp_path / "run")
    assert results[0] == results[1]
    states, state = results[0]
    # As if the third value had been no improvement: tolerance 1 closes at it, and 4.0 beats 5.0 again.
    assert states == [
        (True, 5.0, 0), (False, 5.0, 1), (True, 5.0, 2), (True, 4.0, 0), (False, 4.0, 1), (False, 4.0, 2),
    ]  # fmt: skip
    assert {tolerance: best["value"] for tolerance, best in state["exceeded"].items()} == {"1": 5.0}
    assert (stamp(tmp_path / "run"), stamp(tmp_path / "run", f"{REF}.tolerance=1")) == (4, 1)
    assert verify(tmp_path / "run") == []

    resumed = BestKeeper(
        nn.Linear(1, 1, bias=False), directory=tmp_path / "run", metric_key="loss", tolerances=[1, 5], resume="ledger"
    )
    with resumed:
        assert resumed.state.to_json() == state


def test_queued_best_that_nothing_needs_is_skipped(tmp_path, monkeypatch):
    files = SlowFiles()
    monkeypatch.setattr(store_module, "Files", lambda: files)
    keeper, model = keep(tmp_path)
    with keeper:
        observe(keeper, model, 1, 5.0)
        assert files.has_begun.wait(30)
        observe(keeper, model, 2, 4.0)
        observe(keeper, model, 3, 4.5)
        # Both buffers are taken: the second best, which was not begun, makes room.
        observe(keeper, model, 4, 3.0)
        files.may_go_on.set()
        keeper.flush()
        assert stamp(tmp_path) == 4
    lines = ledger(tmp_path)
    assert [(line["iteration"], "snapshot" in line, line.get("superseded", False)) for line in lines] == [
        ("E1", True, False), ("E2", False, True), ("E3", False, False), ("E4", True, False),
    ]  # fmt: skip

    resumed = BestKeeper(model, directory=tmp_path, metric_key="loss", resume="ledger")
    with resumed:
        assert resumed.state == keeper.state


def test_queued_best_that_a_tolerance_names_is_waited_for(tmp_path, monkeypatch):
    files = SlowFiles()
    monkeypatch.setattr(store_module, "Files", lambda: files)
    keeper, model = keep(tmp_path, tolerances=[0])
    with keeper:
        observe(keeper, model, 1, 5.0)
        assert files.has_begun.wait(30)
        observe(keeper, model, 2, 4.0)
        assert observe(keeper, model, 3, 4.5).newly_exceeded == (0,)
        last = threading.Thread(target=observe, args=(keeper, model, 4, 3.0))
        last.start()
        last.join(0.2)
        assert last.is_alive()
        files.may_go_on.set()
        last.join(30)
    assert (stamp(tmp_path), stamp(tmp_path, f"{REF}.tolerance=0")) == (4, 2)


def test_later_weights_do_not_reach_a_snapshot_that_is_being_written(tmp_path, monkeypatch):
    files = SlowFiles()
    monkeypatch.setattr(store_module, "Files", lambda: files)
    keeper, model = keep(tmp_path)
    with keeper:
        observe(keeper, model, 1, 5.0)
        assert files.has_begun.wait(30)
        with torch.no_grad():
            model.weight.fill_(99)
        files.may_go_on.set()
    assert stamp(tmp_path) == 1


def test_keepers_share_a_snapshot_that_is_still_queued(tmp_path):
    model = nn.Linear(1, 1, bias=False)
    settings = {"directory": tmp_path, "async_save": True}
    keepers = [BestKeeper(model, metric_key=key, **settings) for key in ("loss", "loss/other")]
    for epoch in (1, 2):
        with torch.no_grad():
            model.weight.fill_(epoch)
        for keeper in keepers:
            keeper.observe(-epoch, TrainingIteration(epoch=epoch))
    for keeper in keepers:
        keeper.close()
    assert [stamp(tmp_path, keeper.name) for keeper in keepers] == [2, 2]
    assert len(list((tmp_path / "checkpoints/snapshots").iterdir())) == 1


def test_refused_snapshots_keep_no_buffer(tmp_path):
    keeper, model = keep(tmp_path)
    weight = model.weight
    with keeper:
        for _ in range(3):
            model.weight = nn.Parameter(torch.empty(1, 1, device="meta"))
            with pytest.raises(SnapshotError, match="meta device"):
                keeper.observe(1.0, TrainingIteration(epoch=1))
        model.weight = weight
        assert observe(keeper, model, 1, 1.0).is_new_best
    assert stamp(tmp_path) == 1


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
def test_process_that_ends_by_an_exception_leaves_the_best_on_the_disk(tmp_path, way):
    program = PROGRAM.format(enter=ENTER[way])
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert "RuntimeError: training died" in ended.stderr
    assert (tmp_path / "checkpoints" / REF / "model.pt").exists()
    assert verify(tmp_path) == []

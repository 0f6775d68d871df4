"""Keepers that share a run folder, a worker and now and then a snapshot, and what one of them fails at."""

from __future__ import annotations

import errno
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from keepbest import BestKeeper
from keepbest.errors import RankFailedError
from keepbest.run.verify import verify
from keepbest.staging.host import HostSlot
from tests.kit.files import Operation, SteppedFiles, before
from tests.kit.runs import ledger, refs, set_weights, snapshots, update
from tests.kit.seams import use
from tests.saving.gate import Gate

A, B = "best_model.loss.a", "best_model.loss.b"
WARN = {"on_save_error": "warn"}


class RefusedOnce:
    """Refuses the first operation of this name on the ledger after it was armed, if its data has `text` in it."""

    def __init__(self, name: str, text: bytes = b"") -> None:
        self.name, self.text, self.is_armed = name, text, False

    def __call__(self, operation: Operation) -> None:
        is_it = operation.name == self.name and operation.path.name == "ledger.jsonl"
        if self.is_armed and is_it and self.text in bytes(operation.data):
            self.is_armed = False
            raise OSError(errno.ENOSPC, "No space left on device")


def keepers(directory: Path, model: nn.Module, **settings) -> tuple[BestKeeper, BestKeeper]:
    a, b = (BestKeeper(model, directory=directory, metric_key=f"loss/{name}", **settings) for name in "ab")
    a.start()
    return a, b


def test_keeper_that_starts_leaves_what_is_being_written(tmp_path):
    gate = Gate("snapshot.json")
    with use(tmp_path, files=SteppedFiles(before(gate))):
        a, b = keepers(tmp_path, nn.Linear(1, 1), async_save=True)
        a.observe(1.0, update(1))
        assert gate.is_reached.wait(60)
        timer = threading.Timer(0.2, gate.is_open.set)
        timer.start()
        b.start()
        for keeper in (a, b):
            keeper.close()
    assert verify(tmp_path) == []
    assert refs(tmp_path) == {A: "U1"}


def test_dcp_save_outlives_the_commits_of_a_background_keeper(tmp_path):
    gate, model = Gate("model.pt"), nn.Linear(1, 1)
    with use(tmp_path, files=SteppedFiles(before(gate))):
        a = BestKeeper(model, directory=tmp_path, metric_key="loss/a", async_save=True)
        b = BestKeeper(model, directory=tmp_path, metric_key="loss/b", format="dcp")
        for keeper in (a, b):
            keeper.start()
        a.observe(1.0, update(1))
        assert gate.is_reached.wait(60)
        threading.Timer(0.2, gate.is_open.set).start()
        b.observe(1.0, update(1))
        for keeper in (a, b):
            keeper.close()
    assert verify(tmp_path) == []
    assert refs(tmp_path).keys() == {A, B}


def test_snapshot_whose_commit_failed_is_not_shared(tmp_path):
    fault = RefusedOnce("sync")
    with use(tmp_path, files=SteppedFiles(before(fault))):
        a, b = keepers(tmp_path, nn.Linear(1, 1), **WARN)
        b.start()
        fault.is_armed = True
        assert a.observe(1.0, update(1)).save_failed
        assert b.observe(1.0, update(1)).is_new_best
        b.restore_best()
        for keeper in (a, b):
            keeper.close()
    assert verify(tmp_path) == []
    assert refs(tmp_path) == {B: next(iter(snapshots(tmp_path)))}


def test_shared_snapshot_that_was_removed_is_committed_nowhere(tmp_path):
    gate, fault = Gate("model.pt"), RefusedOnce("write", b'"keeper":"best_model.loss.a","iteration":"U2"')

    def look(operation: Operation) -> None:
        gate(operation)
        fault(operation)

    with use(tmp_path, files=SteppedFiles(before(look))):
        a, b = keepers(tmp_path, nn.Linear(1, 1), async_save=True, keep_top_k=2, tolerances=[0], **WARN)
        b.start()
        fault.is_armed = True
        a.observe(5.0, update(1))
        assert gate.is_reached.wait(60)
        a.observe(6.0, update(2))  # one of the top, which is lost, and closes the tolerance all the same
        b.observe(1.0, update(2))  # shares it
        gate.is_open.set()
        for keeper in (a, b):
            keeper.flush()
        assert (a.best_metric_value, b.state.best) == (5.0, None)
        for keeper in (a, b):
            keeper.close()
    assert not fault.is_armed
    assert verify(tmp_path) == []
    assert refs(tmp_path) == dict.fromkeys([A, f"{A}.tolerance=0", f"{A}.top=1"], "U1")


def test_superseded_line_that_is_refused_once_is_recorded_once(tmp_path):
    gate, fault = Gate("model.pt"), RefusedOnce("write", b"superseded")

    def look(operation: Operation) -> None:
        gate(operation)
        fault(operation)

    with use(tmp_path, files=SteppedFiles(before(look))):
        a, _ = keepers(tmp_path, nn.Linear(1, 1), async_save=True, **WARN)
        a.observe(5.0, update(1))
        assert gate.is_reached.wait(60)
        a.observe(4.0, update(2))
        fault.is_armed = True
        a.observe(3.0, update(3))  # takes the place of the second, which is only queued
        gate.is_open.set()
        a.flush()
        a.close()
    assert not fault.is_armed
    seen = [line["iteration"] for line in ledger(tmp_path) if line["event"] == "observation"]
    assert seen == ["U1", "U2", "U3"]
    assert verify(tmp_path) == []
    resumed = BestKeeper(nn.Linear(1, 1), directory=tmp_path, metric_key="loss/a", resume="ledger")
    with resumed:
        assert resumed.best_metric_value == 3.0


def out_of_memory(*_arguments):
    raise RuntimeError("out of memory")


def test_snapshot_that_was_given_up_counts_for_nobody_else(tmp_path, monkeypatch):
    gate, model = Gate("model.pt"), nn.Linear(1, 1)
    with use(tmp_path, files=SteppedFiles(before(gate))):
        a, b = keepers(tmp_path, model, async_save=True, **WARN)
        b.start()
        a.observe(9.0, update(1))
        assert gate.is_reached.wait(60)
        a.observe(8.0, update(2))
        with monkeypatch.context() as patch:
            patch.setattr(HostSlot, "seal", out_of_memory)
            with pytest.raises(RankFailedError, match="out of memory"):
                a.observe(7.0, update(3))  # it had the buffer of the second given up by then
        b.observe(8.0, update(2))
        gate.is_open.set()
        for keeper in (a, b):
            keeper.flush()
        assert b.state.best is None
        for keeper in (a, b):
            keeper.close()
    assert verify(tmp_path) == []
    assert refs(tmp_path).keys() == {A}


def test_weights_are_freed_when_they_are_written(tmp_path, monkeypatch):
    captured: list[weakref.ref] = []
    cpu = torch.Tensor.cpu

    def copied(tensor):
        copy = cpu(tensor).clone()  # as of a model on an accelerator
        captured.append(weakref.ref(copy))
        return copy

    monkeypatch.setattr(torch.Tensor, "cpu", copied)
    a, _ = keepers(tmp_path, nn.Linear(1, 1))
    a.observe(1.0, update(1))
    assert captured
    assert [alive for alive in captured if alive() is not None] == []
    a.close()


def test_staged_weights_are_freed_when_the_keeper_closes(tmp_path):
    model = nn.Linear(1, 1)
    a, _ = keepers(tmp_path, model, async_save=True)
    set_weights(model, 1)
    a.observe(1.0, update(1))
    a.flush()
    staging = weakref.ref(a._saver._staging)
    a.close()
    assert staging() is None

"""What was committed stays committed, also if what comes after its line fails. Nothing is recorded twice."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch.distributed as dist

from keepbest.decision import fold
from keepbest.errors import IterationError, LedgerError, RankFailedError, StorageError
from keepbest.run.ledger import read_ledger
from keepbest.run.maintenance import repair
from keepbest.run.record import KeeperRecord
from keepbest.run.verify import verify
from tests.faults.filled_run import COMPLETE, POLICY, VALUES, go_on, keeper_of, net, recorded_state, refs_hold, refs_of
from tests.faults.power_cut import LOST, RecordingFiles
from tests.kit.files import SteppedFiles
from tests.kit.pool import run_ranks
from tests.kit.runs import ledger, refs, snapshots
from tests.kit.seams import use


def at(epoch):
    return {"value": VALUES[epoch - 1], "epoch": epoch}


def assert_is_complete(directory):
    seen = [line["iteration"] for line in ledger(directory) if line["event"] == "observation"]
    assert seen == [f"E{epoch}" for epoch in range(1, len(VALUES) + 1)]
    assert verify(directory) == []
    assert refs_hold(directory) == refs_of(COMPLETE)
    assert recorded_state(directory) == COMPLETE


class SlowSync:
    """A sync of the ledger during which a signal comes, once."""

    def __init__(self):
        self.is_armed = False

    def __call__(self, operation):
        if self.is_armed and operation.name == "sync" and operation.path.name == "ledger.jsonl":
            self.is_armed = False
            operation.do()
            os.kill(os.getpid(), signal.SIGINT)
        return operation.do()


@pytest.mark.parametrize("then", ["again", "close", "flush"])
def test_ctrl_c_in_the_sync_of_a_commit_commits_it(then, tmp_path):
    disk, model = SlowSync(), net()
    with use(tmp_path, files=SteppedFiles(disk)):
        keeper = keeper_of(tmp_path, model)
        go_on(keeper, model, VALUES[:4])
        model.weight.data.fill_(5.0)
        disk.is_armed = True
        with pytest.raises(KeyboardInterrupt):
            keeper.observe(**at(5))
        if then == "again":
            assert keeper.observe(**at(5)).is_new_best
        elif then == "flush":
            keeper.flush()
            assert keeper.state.last_iteration.epoch == 5
        if then != "close":
            go_on(keeper, model)
        keeper.close()
    if then == "close":
        with keeper_of(tmp_path, model, resume="ledger") as keeper:
            go_on(keeper, model)
    assert_is_complete(tmp_path)


def test_value_that_differs_from_the_recorded_one_is_refused(tmp_path):
    disk, model = SlowSync(), net()
    with use(tmp_path, files=SteppedFiles(disk)):
        keeper = keeper_of(tmp_path, model)
        go_on(keeper, model, VALUES[:4])
        disk.is_armed = True
        with pytest.raises(KeyboardInterrupt):
            keeper.observe(**at(5))
        with pytest.raises(IterationError, match=r"E5 was recorded with the value 3.0 .* now has the value 2.9"):
            keeper.observe(2.9, epoch=5)
        assert keeper.observe(**at(6)).iteration.epoch == 6
        keeper.abandon()


@pytest.mark.parametrize("in_background", [False, True])
def test_removal_thread_that_cannot_start_loses_no_best(in_background, tmp_path, monkeypatch):
    start = threading.Thread.start

    def refuse(thread):
        if thread.name == "keepbest-removal":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    model = net()
    with keeper_of(tmp_path, model, async_save=in_background) as keeper:
        assert all(seen.durable for seen in go_on(keeper, model))
    assert snapshots(tmp_path) == {"E2", "E8"}
    assert_is_complete(tmp_path)


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, OSError])
@pytest.mark.parametrize("name", ["rename", "link", "sync_folder"])
@pytest.mark.parametrize("in_background", [False, True])
def test_any_exception_after_the_line_loses_no_best(in_background, name, error, tmp_path):
    is_armed = False

    def break_down(operation):
        folder = operation.path if name == "sync_folder" else operation.path.parent
        if is_armed and operation.name == name and folder.name == "checkpoints":
            raise error
        return operation.do()

    model, raised = net(), 0
    with use(tmp_path, files=SteppedFiles(break_down)):
        keeper = keeper_of(tmp_path, model, async_save=in_background)
        keeper.start()
        is_armed = True
        while keeper.state.last_iteration != COMPLETE.last_iteration:
            try:
                assert all(seen.durable for seen in go_on(keeper, model))
                keeper.flush()
            except RankFailedError:
                raised += 1
        is_armed = False
        keeper.abandon()
    assert (raised > 0) == (error is not OSError)
    with keeper_of(tmp_path, model, resume="ledger"):
        pass
    assert_is_complete(tmp_path)


@pytest.mark.parametrize("number", range(1, 9))
def test_sync_that_failed_is_not_trusted_after_it_succeeds(number, tmp_path):
    """Linux marks pages as written that it could not write, so the next sync of the file returns at once."""
    root = tmp_path / "recorded"
    root.mkdir()
    files, model = RecordingFiles(root), net()
    record, syncs, lost = files._step, [], []

    def fail_once(operation):
        if operation.name == "sync" and operation.path.name == "ledger.jsonl":
            syncs.append(operation)
            if len(syncs) == number + 2:
                inode = files.inode_of(operation.path)
                lost.extend(each for each in files.unsynced(len(files.log)) if files.log[each].inode == inode)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return record(operation)

    files._step = fail_once
    with use(root / "run", files=files):
        keeper = keeper_of(root / "run", model, on_save_error="warn")
        seen = go_on(keeper, model)
        try:
            keeper.flush()
        except StorageError:
            keeper.flush()
        keeper.abandon()
    place = tmp_path / "after"
    files.after_power_cut(len(files.log), dict.fromkeys(lost, LOST)).build(files.ROOT, place)
    events, _ = read_ledger(place / "run/checkpoints/ledger.jsonl")
    assert sum(event.name == "observation" for event in events) == len(VALUES)
    assert recorded_state(place / "run") == fold(POLICY, seen)
    repair(place / "run")
    assert verify(place / "run") == []


@pytest.mark.parametrize("epoch", [3, 5])  # a quiet one, and a new best that is lost
@pytest.mark.parametrize("in_background", [False, True])
def test_observation_outlives_an_interrupt_and_then_a_full_disk(in_background, epoch, tmp_path):
    sync, model, is_full = SlowSync(), net(), False

    def step(operation):
        if is_full and operation.path.name == ".tmp-ledger.jsonl":
            raise OSError(errno.ENOSPC, "No space left on device")
        if operation.path.name == "ledger.jsonl" and b'"event":"pin"' in bytes(operation.data):
            sync.is_armed = True
        return sync(operation)

    with use(tmp_path, files=SteppedFiles(step)):
        keeper = keeper_of(tmp_path, model, async_save=in_background, on_save_error="warn")
        go_on(keeper, model, VALUES[: epoch - 1])
        with pytest.raises(KeyboardInterrupt):
            keeper.flush(pin="a")
        is_full = True
        go_on(keeper, model, VALUES[:epoch])
        keeper._run.worker.drain()
        is_full = False
        go_on(keeper, model)
        keeper.flush()
        keeper.abandon()
    seen = [line["iteration"] for line in ledger(tmp_path) if line["event"] == "observation"]
    assert seen == [f"E{number}" for number in range(1, len(VALUES) + 1)]
    assert recorded_state(tmp_path) == keeper.state


@pytest.mark.parametrize("last", ["write ledger.jsonl", "sync ledger.jsonl"])
def test_disk_that_refuses_again_after_the_repair_loses_no_line(last, tmp_path):
    refused, model = [], net()

    def refuse_in_turn(operation):
        if refused and f"{operation.name} {operation.path.name}" == refused[0]:
            raise OSError(errno.EIO, refused.pop(0))
        return operation.do()

    with use(tmp_path, files=SteppedFiles(refuse_in_turn)):
        keeper = keeper_of(tmp_path, model)
        go_on(keeper, model, VALUES[:4])
        refused += ["sync ledger.jsonl", "create .tmp-ledger.jsonl", last]
        model.weight.data.fill_(5.0)
        for _ in range(2):
            with pytest.raises(StorageError):
                keeper.observe(**at(5))
        assert refused == []
        go_on(keeper, model)
        keeper.close()
    assert_is_complete(tmp_path)


def replace_ledger(path):
    shutil.copy(path, path.with_name("copy"))
    path.with_name("copy").replace(path)


def cut_ledger(path):
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


HARM = {
    "ledger removed": lambda folder: (folder / "ledger.jsonl").unlink(),
    "ledger replaced": lambda folder: replace_ledger(folder / "ledger.jsonl"),
    "ledger emptied": lambda folder: (folder / "ledger.jsonl").write_bytes(b""),
    "ledger written over": lambda folder: cut_ledger(folder / "ledger.jsonl"),
    "folder removed": shutil.rmtree,
    "folder moved": lambda folder: folder.rename(folder.with_name("elsewhere")),
}


def harm(directory, kind, in_background):
    model, found = net(), []
    keeper = keeper_of(directory, model, async_save=in_background, rank_timeout=20.0)
    go_on(keeper, model, VALUES[:2])
    keeper.flush()
    if dist.get_rank() == 0:
        HARM[kind](directory / "checkpoints")
    for act in (lambda: keeper.observe(**at(5)), keeper.flush, lambda: keeper.observe(**at(8)), keeper.flush):
        try:
            act()
        except StorageError as error:
            found.append(str(error))
    keeper.abandon()
    return found


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("kind", HARM)
def test_ledger_gone_under_a_live_run_is_an_error_on_every_rank(kind, in_background, tmp_path):
    found = run_ranks(harm, 2, tmp_path, kind, in_background)
    assert found[0] == found[1]
    assert len(found[0]) == (2 if in_background else 4)  # each call; in the background those that wait
    assert all("removed, replaced or changed while the run was open" in message for message in found[0]), found[0]


def test_older_ledger_in_a_folder_without_links_is_refused(tmp_path):
    model, folder = net(), tmp_path / "run/checkpoints"
    keeper = keeper_of(tmp_path / "run", model)
    go_on(keeper, model, VALUES[:2])
    keeper.flush()
    older = (folder / "ledger.jsonl").read_bytes()
    go_on(keeper, model)
    keeper.close()
    shutil.copytree(folder, tmp_path / "copy/checkpoints", symlinks=False)
    for link in [*(tmp_path / "copy/checkpoints").glob("best_model*")]:
        shutil.rmtree(link)
    (tmp_path / "copy/checkpoints/ledger.jsonl").write_bytes(older)
    before = snapshots(tmp_path / "copy")
    for act in (
        lambda: keeper_of(tmp_path / "copy", model, resume="ledger").start(),
        lambda: repair(tmp_path / "copy"),
    ):
        with pytest.raises(LedgerError, match="is an older copy"):
            act()
    assert snapshots(tmp_path / "copy") == before
    assert refs(tmp_path / "copy") == {}


def test_observation_that_failed_before_its_record_counts_nowhere(tmp_path, monkeypatch):
    model, record = net(), KeeperRecord.observe
    keeper = keeper_of(tmp_path, model)
    go_on(keeper, model, VALUES[:3])
    monkeypatch.setattr(KeeperRecord, "observe", Mock(side_effect=MemoryError))
    keeper.observe(**at(4))
    monkeypatch.setattr(KeeperRecord, "observe", record)
    with pytest.raises(RankFailedError, match="MemoryError"):
        keeper.observe(**at(5))
    assert keeper.observe(**at(5)).is_new_best
    keeper.abandon()
    assert keeper.state == recorded_state(tmp_path)


def fail_to_know_what_is_recorded(directory):
    model = net()
    keeper = keeper_of(directory, model, rank_timeout=20.0)
    go_on(keeper, model, VALUES[:4])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeeperRecord, "keep", Mock(side_effect=MemoryError))
        with pytest.raises(RankFailedError):
            keeper.observe(**at(5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeeperRecord, "revision", Mock(side_effect=LedgerError("damaged")))
        with pytest.raises(LedgerError) as caught:
            keeper.observe(**at(5))
    outcome = keeper.observe(**at(5))
    keeper.abandon()
    return str(caught.value), outcome


def test_rank_0_that_cannot_read_its_record_leaves_nobody_waiting(tmp_path):
    found = run_ranks(fail_to_know_what_is_recorded, 2, tmp_path)
    assert found[0] == found[1]
    assert found[0][1].is_new_best


def test_line_owed_outlives_an_interrupt_while_the_keeper_leaves(tmp_path):
    is_full, is_interrupted, model = True, False, net()

    def step(operation):
        nonlocal is_interrupted
        if operation.name == "write" and operation.path.name == "ledger.jsonl" and b"E3" in bytes(operation.data):
            if is_full:
                raise OSError(errno.ENOSPC, "No space left on device")
            if not is_interrupted:
                is_interrupted = True
                raise KeyboardInterrupt
        return operation.do()

    with use(tmp_path, files=SteppedFiles(step)):
        keeper = keeper_of(tmp_path, model, on_save_error="warn")
        go_on(keeper, model, [5.0, 4.0, 4.5])
        is_full, others = False, threading.enumerate()
        with pytest.raises(KeyboardInterrupt):
            keeper.abandon()
        assert is_interrupted
        for thread in threading.enumerate():
            if thread.name == "keepbest-release" and thread not in others:
                thread.join(30)
        assert [line["iteration"] for line in ledger(tmp_path) if line["event"] == "observation"] == ["E1", "E2", "E3"]
    with keeper_of(tmp_path, model, resume="ledger"):
        pass


@pytest.mark.parametrize("number", range(1, 7))
def test_folder_whose_sync_was_refused_is_synced_by_the_next_start(number, tmp_path):
    run, synced, syncs = tmp_path / "runs/a", list[Path](), 0

    def step(operation):
        nonlocal syncs
        if operation.name == "sync_folder":
            syncs += 1
            if syncs == number:
                raise OSError(errno.EIO, "Input/output error")
            synced.append(operation.path)
        return operation.do()

    with use(run, files=SteppedFiles(step)):
        with pytest.raises(StorageError, match="Input/output error"):
            keeper_of(run, net()).start()
        synced.clear()
        keeper = keeper_of(run, net())
        keeper.start()
        # A power cut from here on must not take the run: each name that leads to it is on the disk.
        assert {run.parent, run, run / "checkpoints"} <= set(synced)
        assert tmp_path in synced or number > 1
        keeper.abandon()

"""File systems that lack something, and how a run is kept there all the same: slow, full, without links, and so on."""

from __future__ import annotations

import errno
import os
import stat
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from keepbest import BestKeeper, load
from keepbest.export import export
from keepbest.run.files import Files
from keepbest.run.folder import RunFolder
from keepbest.run.maintenance import repair
from keepbest.run.verify import verify
from tests.faults.disks import fill
from tests.faults.filled_run import BEST, COMPLETE, VALUES, go_on, keeper_of, net, refs_hold, refs_of
from tests.kit.files import Fault, Operation, SteppedFiles, before
from tests.kit.pool import run_ranks
from tests.kit.runs import snapshots
from tests.kit.seams import use


def train_on_a_slow_disk(directory: Path) -> int:
    seconds = 0.5

    def slowly(operation: Operation) -> None:
        if operation.name in ("sync", "sync_folder"):
            time.sleep(seconds)  # is the slow disk

    model = net()
    with use(directory, files=SteppedFiles(before(slowly))):
        keeper = keeper_of(directory, model, format="dcp", rank_timeout=1.5, save_timeout=60.0)
        keeper.start()
        seconds = 0.0
        go_on(keeper, model, VALUES[:3])
        seconds = 1.0
        go_on(keeper, model, VALUES[:4])  # rank 0 records that a tolerance is exceeded, and the others go on
        seconds = 0.0
        go_on(keeper, model)
        keeper.abandon()
    return keeper.state.last_iteration.epoch


def test_slow_disk_is_bounded_by_save_timeout_from_the_start(memory_folder):
    # Both exchanges of the start take longer than ranks wait for each other: the folders to be made are many.
    assert run_ranks(train_on_a_slow_disk, 2, memory_folder / "a" / "b" / "c" / "run") == [9, 9]


@pytest.mark.parametrize("code", [errno.EPERM, errno.EINVAL, errno.EACCES, errno.EPROTO, errno.EIO, 524])
def test_without_links_everything_else_is_as_it_should_be(code, memory_folder, caplog):
    fault = Fault("link", 1, 10**9, error=code)
    with use(memory_folder, files=SteppedFiles(before(fault))):
        for values in (VALUES[:5], VALUES):  # two sessions
            with keeper_of(memory_folder, model := net(), resume="ledger") as keeper:
                go_on(keeper, model, values)
        assert [path.name for path in (memory_folder / "checkpoints").glob("best_model.*")] == []
        assert refs_hold(memory_folder) == refs_of(COMPLETE)
        assert snapshots(memory_folder) == {"E2", "E8.r1"}
        assert verify(memory_folder) == []
        assert sum("links are refused" in record.message for record in caplog.records) == 2
        # Where links can be made again, the next session makes them.
        fault.end()
        with keeper_of(memory_folder, net(), resume="ledger"):
            pass
    assert verify(memory_folder) == []


@pytest.mark.parametrize("refused", ["link", "rename", "sync_folder"])
def test_link_that_was_refused_once_follows_with_the_next_commit(refused, memory_folder):
    model, armed = net(), []

    def refuse(operation: Operation) -> None:
        if armed and operation.name == refused and operation.path.name in (BEST, f".tmp-{BEST}", "checkpoints"):
            armed.clear()
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with use(memory_folder, files=SteppedFiles(before(refuse))):
        keeper = keeper_of(memory_folder, model)
        go_on(keeper, model, VALUES[:1])
        armed.append(refused)
        go_on(keeper, model)
        assert not armed
        keeper.close()
        assert verify(memory_folder) == []


def test_tolerance_that_is_exceeded_costs_few_operations(memory_folder):
    directory, model, done = memory_folder / "run", net(), []
    with use(directory, files=SteppedFiles(before(lambda operation: done.append(operation.name)))):
        keeper = keeper_of(directory, model)
        go_on(keeper, model, VALUES[:3])
        keeper.flush()  # the space of what was replaced is freed on a thread
        done.clear()
        go_on(keeper, model, VALUES[:4])
        assert keeper.state.exceeded
        keeper.abandon()
    assert done == ["write", "sync", "link", "rename", "sync_folder", "close"]


REFUSED_FSYNCS = [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM, 524]


def refuse_to_sync_folders(monkeypatch, code: int) -> None:
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("code", REFUSED_FSYNCS)
def test_folders_that_are_not_synced_are_one_warning(code, tmp_path, monkeypatch, caplog):
    refuse_to_sync_folders(monkeypatch, code)
    with keeper_of(tmp_path, model := net()) as keeper:
        go_on(keeper, model)
    assert verify(tmp_path) == []
    assert refs_hold(tmp_path) == refs_of(COMPLETE)
    messages = [record.message for record in caplog.records if "does not sync folders" in record.message]
    assert len(messages) == 1


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE])
def test_folder_that_could_not_be_synced_is_an_error(code, tmp_path, monkeypatch):
    refuse_to_sync_folders(monkeypatch, code)
    with pytest.raises(OSError, match=rf"Errno {code}"):
        Files().sync_folder(tmp_path)


@pytest.mark.parametrize("file_format", ["torch", "safetensors", "dcp"])
def test_weights_are_read_and_exported_where_no_file_can_be_mapped(file_format, tmp_path, monkeypatch):
    def refuse(*_arguments, **_settings):
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    for place in ("mmap.mmap", "torch.UntypedStorage.from_file", "safetensors.safe_open"):
        monkeypatch.setattr(place, refuse)
    model = nn.Sequential(net(), net())
    model[1].weight = model[0].weight
    with BestKeeper(model, directory=tmp_path / "run", metric_key="loss", format=file_format) as keeper:
        keeper.observe(1.0, epoch=1)
    kept = model[0].weight.detach().clone()
    nn.init.zeros_(model[0].weight)
    load(tmp_path / "run", BEST, model)
    assert torch.equal(model[0].weight, kept)
    export(tmp_path / "run", BEST, tmp_path / "model.pt")
    exported = torch.load(tmp_path / "model.pt", weights_only=True)
    assert torch.equal(exported["0.weight"], kept)
    assert torch.equal(exported["1.weight"], kept)


def test_repair_frees_the_space_of_a_full_disk(small_disk):
    directory, model = small_disk / "run", net()
    with keeper_of(directory, model) as keeper:
        go_on(keeper, model)
    left = directory / "checkpoints/snapshots/.tmp-E20"  # of a process that was killed
    left.mkdir()
    (left / "model.pt").write_bytes(bytes(200_000))
    (directory / "checkpoints/lock").unlink()
    fill(small_disk)
    repair(directory)
    assert verify(directory) == []
    assert not left.exists()


def test_repair_makes_the_links_for_which_there_was_no_room(memory_folder):
    model = net()
    with keeper_of(memory_folder, model) as keeper:
        go_on(keeper, model)
    (memory_folder / "checkpoints" / BEST).unlink()
    folder = RunFolder(memory_folder, SteppedFiles(before(Fault("link", 1, 1, error=errno.ENOSPC))))
    folder.claim()
    folder.repair()
    folder.close()
    assert verify(memory_folder) == []
    assert load(memory_folder, BEST, model).value == COMPLETE.best.value

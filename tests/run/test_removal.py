from __future__ import annotations

import shutil
import signal
import threading

import pytest

from keepbest.run.files import Files
from keepbest.run.snapshot_folder import SnapshotFolder
from keepbest.worker import Threaded
from tests.kit.runs import Run, refs, snapshots, update


def names(run):
    return {path.name for path in (run.keeper.directory / "checkpoints" / "snapshots").iterdir()}


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def test_new_best_does_not_wait_for_the_removal_of_the_old_one(run, monkeypatch):
    remove, close, create = shutil.rmtree, Threaded.close, Files.create
    is_waited_for = threading.Event()
    found = []

    def close_and_say_so(thread, timeout=None):
        if timeout is None:
            is_waited_for.set()
        return close(thread, timeout)

    def look_and_create(files, path):
        found.append(names(run) - {path.parent.name})
        return create(files, path)

    monkeypatch.setattr("keepbest.run.files.shutil.rmtree", lambda path: is_waited_for.wait(60) and remove(path))
    monkeypatch.setattr(Threaded, "close", close_and_say_so)
    monkeypatch.setattr(Files, "create", look_and_create)
    with run.keeper as keeper:
        keeper.observe(3.0, update(1))
        keeper.observe(2.0, update(2))
        assert names(run) == {".tmp-removed-U1", "U2"}
        keeper.observe(1.0, update(3))
        assert found[-1] == {"U2"}  # the space of U1 was free when U3 was written
        is_waited_for.clear()
        keeper.flush()
        assert names(run) == {"U3"}


def test_failed_removal_is_logged_and_retried_at_the_next_best(run, monkeypatch, caplog):
    remove = shutil.rmtree
    refusals = [PermissionError("not now")]
    monkeypatch.setattr(
        "keepbest.run.files.shutil.rmtree",
        lambda path: (_ for _ in ()).throw(refusals.pop()) if refusals else remove(path),
    )
    with run.keeper as keeper:
        keeper.observe(3.0, update(1))
        keeper.observe(2.0, update(2))
        keeper.flush()
        assert names(run) == {".tmp-removed-U1", "U2"}
        assert "no longer needed stay until the next save: not now" in caplog.text
        keeper.observe(1.0, update(3))
        keeper.flush()
        assert names(run) == snapshots(run.keeper.directory) == set(refs(run.keeper.directory).values()) == {"U3"}


def test_interrupted_wait_for_a_removal_is_made_up_for(tmp_path, monkeypatch):
    remove, may_go = shutil.rmtree, threading.Event()
    monkeypatch.setattr("keepbest.run.files.shutil.rmtree", lambda path: may_go.wait(60) and remove(path))
    folder = SnapshotFolder(Files(), tmp_path)
    (tmp_path / "U1").mkdir()
    folder.remove_all_but(set())
    threading.Timer(0.2, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        folder.finish_removal()
    threading.Timer(0.2, may_go.set).start()
    folder.finish_removal()
    assert list(tmp_path.iterdir()) == []

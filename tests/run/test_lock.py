"""Who owns a run folder: what takes its lock away, what does not, who waits for it, and file systems that refuse it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import threading
from functools import partial
from pathlib import Path

import pytest

from keepbest.errors import RunExistsError
from keepbest.remote.upload import upload
from keepbest.run import lock as lock_module
from keepbest.run.lock import RunLock
from keepbest.run.maintenance import repair
from tests.kit.child import pause
from tests.kit.pool import start_ranks
from tests.kit.runs import Run, update

REFUSALS = ["ENOLCK", "ENOSYS", "ENOTSUP", "EINVAL", "EBADF", "EPERM", "EIO"]


def taken(path: Path, **settings) -> RunLock:
    lock = RunLock(path, **settings)
    lock.acquire()
    return lock


def hold_beside_a_reader_and_a_child(path):
    """Holds the lock, closes the file elsewhere, as a copy of the folder does, and has a child that lives on."""
    lock = taken(path)
    path.read_bytes()
    if (child := os.fork()) == 0:
        signal.pause()
    path.with_name("child").write_text(str(child))
    pause("holding")
    return lock


def test_lock_outlives_a_copy_and_ends_with_its_process(tmp_path, caplog):
    path = tmp_path / "lock"
    with start_ranks(hold_beside_a_reader_and_a_child, 1, path, init=False) as ranks:
        ranks.wait_for(0, "holding")
        child = int((tmp_path / "child").read_text())
        try:
            with pytest.raises(RunExistsError, match=rf'in use by another process .*"pid": {ranks.processes[0].pid}'):
                taken(path)
            threading.Timer(0.3, ranks.signal, (0, signal.SIGKILL)).start()
            taken(path, patience=20.0).release()  # as a restart that meets a process on its way out
            os.kill(child, 0)
        finally:
            os.kill(child, signal.SIGKILL)
    assert [record.message for record in caplog.records if "waiting for another process" in record.message]


def hold_a_run(directory):
    with Run(directory).keeper as keeper:
        keeper.observe(1.0, update(1))
        pause("holding")
        keeper.observe(0.5, update(2))


def test_command_on_a_live_run_says_when_to_come_back(tmp_path):
    run, elsewhere = tmp_path / "run", f"file://{tmp_path}/copy"
    messages = []
    with start_ranks(hold_a_run, 1, run, init=False) as ranks:
        ranks.wait_for(0, "holding")
        for command in (partial(repair, run), partial(upload, run, elsewhere)):
            with pytest.raises(RunExistsError, match="in use by another process") as refused:
                command()
            messages.append(str(refused.value))
    assert ["another directory" in message for message in messages] == [False, False]
    assert "repair the run when it has ended" in messages[0]
    assert "upload the run when it has ended, or let it follow by itself: remote='file://" in messages[1]


@pytest.fixture
def held(tmp_path):
    """A lock that is held by an open file of which keepbest knows nothing."""
    with (tmp_path / "lock").open("w") as file:
        assert lock_module._refusal_of_lock(file.fileno()) is None
        yield tmp_path / "lock"


def test_process_of_another_host_is_not_waited_for(held):
    held.write_text(json.dumps({"host": "another one", "pid": 1}))
    with pytest.raises(RunExistsError, match="another one"):
        taken(held, patience=1.0, clock=lambda: 0.0)


def test_second_lock_in_a_process_is_refused_and_the_first_stays(tmp_path, monkeypatch):
    first = taken(tmp_path / "lock")
    for _ in ("OFD", "POSIX"):
        with pytest.raises(RunExistsError, match="open in this process already"):
            taken(tmp_path / "lock", patience=20.0)
        monkeypatch.delattr(fcntl, "F_OFD_SETLK", raising=False)
    first.release()
    first.release()
    taken(tmp_path / "lock").release()


def test_lock_that_nobody_releases_goes_with_its_owner(tmp_path):
    lock = taken(tmp_path / "lock")
    with pytest.raises(RunExistsError):
        taken(tmp_path / "lock")
    del lock
    taken(tmp_path / "lock").release()


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_lock_is_one_warning(name, tmp_path, monkeypatch, caplog):
    code = getattr(errno, name)

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    posix = taken(tmp_path / "posix")  # which such a file system may have
    assert caplog.records == []
    monkeypatch.setattr(fcntl, "lockf", refuse)
    none = taken(tmp_path / "none")
    assert len(caplog.records) == 1
    assert "this file system has no locks" in caplog.text
    posix.release()
    none.release()


@pytest.mark.parametrize("function", ["open", "pwrite"])
def test_full_disk_is_not_in_the_way_of_a_lock(function, tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "lock").write_text("of somebody who is gone")
    with monkeypatch.context() as patch:
        patch.setattr(os, function, refuse)
        lock = taken(tmp_path / "lock")
    if function == "pwrite":
        assert (tmp_path / "lock").read_text() == ""
    assert ("would go unnoticed" in caplog.text) == (function == "open")
    lock.release()

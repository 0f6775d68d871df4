"""A run that is read from Python: what it says, and that reading disturbs nobody."""

from __future__ import annotations

import fcntl
import math
import os
import re
import sys
import threading
import time

import pytest

from keepbest import open_run
from keepbest.errors import ConfigError, RunExistsError, SnapshotError
from keepbest.remote.storage import Remote
from keepbest.run.layout import LOCK
from keepbest.run.lock import RunLock, read_owner
from tests.kit.cli_runs import tree
from tests.kit.pool import start_ranks
from tests.kit.runs import Run, ledger, refs, set_weights, snapshots, update

BEST = "best_model.loss"
VALUES = [5.0, 4.0, math.nan, 4.5, 3.0]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    run = Run(directory, tolerances=[1], keep_top_k=2)
    with run.keeper:
        run.observe(*VALUES)
    return directory


def test_refs_and_the_best_are_those_on_the_disk(directory):
    run = open_run(directory)
    assert {ref: each.snapshot for ref, each in run.refs.items()} == refs(directory)
    assert (run.best().value, run.best().iteration, run.best(BEST)) == (3.0, "U5", run.refs[BEST])
    assert run.refs[f"{BEST}.tolerance=1"].exceeded
    assert (run.id, run.restarts, run.activity) == (ledger(directory)[0]["run"], 0, None)
    [keeper] = run.keepers.values()
    assert (keeper.better, keeper.observations, keeper.intervals_since_best, keeper.has_ended) == ("lower", 5, 0, True)
    assert run.verify() == []
    assert repr(run) == f"<Run {directory}: loss 3.0 (lower is better)>"


def test_rows_of_the_history_are_what_pandas_takes(directory):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    run = open_run(directory)
    frame = pandas.DataFrame(run.history())
    seen = frame[frame.event == "observation"].set_index("update")
    assert {key: repr(value) for key, value in seen.value.items()} == {
        number: repr(value) for number, value in enumerate(VALUES, start=1)
    }
    assert list(seen[seen.is_new_best].index) == [1, 2, 5]
    assert seen.value.idxmin() == 5
    answers = pandas.DataFrame(run.tolerances([0, 1, 9])).set_index("tolerance")
    assert dict(answers.iteration) == {0: "U2", 1: "U2", 9: "U5"}
    assert dict(answers.snapshot) == {0: "U2", 1: "U2", 9: "U5"}


def test_choice_that_nobody_made_is_asked_for(directory, tmp_path):
    with pytest.raises(ConfigError, match=r"has no keeper 'loss'; there are: best_model\.loss"):
        open_run(directory).history("loss")
    with Run(tmp_path).keeper, Run(tmp_path, metric_key="accuracy").keeper as keeper:
        keeper.observe(1.0, update(1))
    with pytest.raises(ConfigError, match=r"has 2 keepers; choose one of: best_model\.loss, best_model\.accuracy"):
        open_run(tmp_path).best()
    with pytest.raises(SnapshotError, match="is not the directory of a run"):
        open_run(tmp_path / "elsewhere")


def test_reading_a_live_run_writes_nothing_and_shows_its_work(tmp_path):
    run = Run(tmp_path, tolerances=[1])
    with run.keeper:
        run.observe(3.0, 2.0)
        run.keeper.flush()  # the space of the first one is free
        unfinished = tmp_path / "checkpoints" / "snapshots" / ".tmp-U9"
        unfinished.mkdir()
        (unfinished / "model.pt").write_bytes(bytes(1234))
        before = tree(tmp_path)
        found = open_run(tmp_path)
        assert (found.activity.pid, found.activity.writing) == (os.getpid(), {"U9": 1234})
        assert not found.keepers[BEST].has_ended
        assert tree(tmp_path) == before
        run.observe(1.0, first=3)
    assert open_run(tmp_path).activity is None
    assert (found.best().iteration, open_run(tmp_path).best().iteration) == ("U2", "U3")


def see_and_take(path):
    """Who holds the lock, as another process sees it, and whether that process gets it."""
    owner = read_owner(path)
    try:
        RunLock(path).acquire()
    except RunExistsError:
        return owner.pid, False
    return owner, True


@pytest.mark.parametrize("kind", ["of open files", "of processes"])
def test_looking_at_a_lock_neither_takes_nor_drops_it(kind, tmp_path, monkeypatch):
    if kind == "of processes":  # closing the file anywhere in this process would drop such a lock
        monkeypatch.delattr(fcntl, "F_OFD_SETLK")
    lock = RunLock(tmp_path / LOCK)
    lock.acquire()
    assert read_owner(tmp_path / LOCK).pid == os.getpid()
    for expected in ((os.getpid(), False), (None, True)):
        with start_ranks(see_and_take, 1, tmp_path / LOCK, init=False) as ranks:
            [outcome] = ranks.collect(timeout=60)
        assert outcome.result == expected
        lock.release()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"host": "a", "pid": "x"}', b'{"host": 1, "pid": 2, "uploading": 3}']
)
def test_lock_file_of_anybody_is_no_error(content, tmp_path):
    lock = RunLock(tmp_path / LOCK)
    lock.acquire()
    (tmp_path / LOCK).write_bytes(content)
    assert read_owner(tmp_path / LOCK) is None


def test_owner_is_read_while_a_shorter_note_comes(tmp_path):
    lock = RunLock(tmp_path / LOCK)
    lock.acquire()
    lock.note("file:///copy", ["U1", "U2"])
    longer = (tmp_path / LOCK).read_bytes()
    lock.note("file:///copy", [])
    shorter = (tmp_path / LOCK).read_bytes()
    (tmp_path / LOCK).write_bytes(shorter + longer[len(shorter) :])  # written, and not cut off yet
    found = read_owner(tmp_path / LOCK)
    assert (found.pid, found.remote, found.uploading) == (os.getpid(), "file:///copy", ())


def test_snapshot_that_went_while_the_run_was_read_is_read_anew(tmp_path, monkeypatch):
    run = Run(tmp_path)
    with run.keeper:
        run.observe(3.0)
        old = open_run(tmp_path)._events
        run.observe(2.0, first=2)
        # Each of so many times the run is ahead by the time that it is looked at again.
        read, answers = sys.modules["keepbest.reading.run"].read_events, iter([old, None] * 10)
        monkeypatch.setattr("keepbest.reading.run.read_events", lambda path: next(answers, None) or read(path))
        found = open_run(tmp_path).best()
    assert (snapshots(tmp_path), found.snapshot, found.damage) == ({"U2"}, "U2", None)


def test_upload_under_way_is_seen_from_outside(tmp_path, monkeypatch):
    free, put = threading.Event(), Remote.put

    def put_when_free(remote, file, path):
        assert free.wait(60)
        put(remote, file, path)

    def uploading():
        found = open_run(tmp_path / "run").activity
        return found.remote, found.uploading

    def wait_for(expected):
        deadline = time.monotonic() + 60
        while uploading() != expected:
            assert time.monotonic() < deadline, uploading()
            time.sleep(0.01)  # the thread that uploads takes its time

    monkeypatch.setattr(Remote, "put", put_when_free)
    url = f"file://{tmp_path / 'copy'}"
    run = Run(tmp_path / "run", remote=url)
    with run.keeper:
        set_weights(run.model, 1)
        run.observe(3.0)
        wait_for((url, ("U1",)))
        free.set()
        wait_for((url, ()))


ATTACK = '<script>alert("a")</script>'


def test_notebook_shows_a_run_and_a_keeper_and_runs_nothing(tmp_path):
    run = Run(tmp_path / ATTACK, metric_key=f"loss{ATTACK}", tolerances=[1])
    assert "there is nothing" in run.keeper._repr_html_()
    with run.keeper:
        assert "nothing observed yet" in run.keeper._repr_html_()
        run.observe(3.0, 2.0)
        shown = run.keeper._repr_html_()
        assert shown == open_run(tmp_path / ATTACK)._repr_html_()
    for text in (shown, run.keeper._repr_html_()):
        assert text.count("<svg") == 1
        assert "new best; the best is 2 at U2" in text
        assert "&lt;script&gt;" in text
        assert "<script" not in text
        assert not re.search(r"(src|href)=\"(?!#)", text)


def test_notebook_without_matplotlib_shows_the_table(directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = open_run(directory)._repr_html_()
    assert "pip install &#x27;keepbest[plot]&#x27;" in text
    assert all(f"<code>{ref}</code>" in text for ref in refs(directory))


def test_prompt_shows_what_a_keeper_has_kept(tmp_path):
    run = Run(tmp_path)
    assert repr(run.keeper) == f"<BestKeeper best_model.loss in {tmp_path}: nothing kept yet>"
    with run.keeper:
        run.observe(3.0, 2.0, 2.5)
    assert repr(run.keeper) == f"<BestKeeper best_model.loss in {tmp_path}: best 2.0>"

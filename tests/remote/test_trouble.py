"""What must not happen to a remote copy, or because of it, whatever else does."""

from __future__ import annotations

import errno
import itertools
import json
import threading

import fsspec
import pytest
from torch import nn

from keepbest import load
from keepbest.errors import ConfigError, LedgerError, RunExistsError, SnapshotError, StorageError
from keepbest.remote import mirror
from keepbest.remote.storage import Remote
from keepbest.remote.upload import upload
from keepbest.remote.verify import verify_run as verify
from tests.kit.runs import Run, refs, set_weights, update
from tests.kit.seams import use
from tests.remote.runs import broken_promises, local_files

BEST = "best_model.loss"
_numbers = itertools.count()


class Place:
    """A place in the memory of this process."""

    def __init__(self, name="run"):
        self.storage = fsspec.filesystem("memory")
        self.root = f"/trouble-{next(_numbers)}/{name}"
        self.url = f"memory:/{self.root}"

    def objects(self):
        root = f"{self.root}/checkpoints/"
        return {path.removeprefix(root): self.storage.cat_file(path) for path in self.storage.find(root[:-1])}

    def put(self, path, data):
        self.storage.pipe_file(f"{self.root}/checkpoints/{path}", data)

    def remove(self, path):
        self.storage.rm_file(f"{self.root}/checkpoints/{path}")


@pytest.fixture
def place():
    return Place()


@pytest.fixture
def impatient(tmp_path):
    with use(tmp_path, patience=0.5):
        yield


def test_what_is_not_of_this_run_stays(tmp_path, place):
    others = {"epoch=3.ckpt": b"mine", "snapshots/readme.txt": b"mine too"}
    for path, data in others.items():
        place.put(path, data)
    run = Run(tmp_path, remote=place.url)
    with run.keeper:
        others["snapshots/E1/model.pt"] = b"of somebody who does not know that this place is taken"
        place.put("snapshots/E1/model.pt", others["snapshots/E1/model.pt"])
        run.observe(3.0, 2.0, 1.0)
    assert place.objects() == {**others, **local_files(tmp_path)}


def test_snapshots_without_a_ledger_are_left_alone_and_refused(tmp_path, place):
    place.put("snapshots/E1/model.pt", b"of another run")
    with pytest.raises(LedgerError, match="has no ledger, and snapshots that are none of this run: E1"):
        Run(tmp_path, remote=place.url).keeper.start()
    assert place.objects() == {"snapshots/E1/model.pt": b"of another run"}


def test_signs_of_a_pattern_in_a_url_are_no_pattern(tmp_path):
    neighbour, mine = Place("lr=a"), Place()
    neighbour.put("snapshots/U1/model.pt", b"of a neighbour")
    mine.root = neighbour.root.replace("lr=a", "lr=[ab]?*")
    mine.url = f"memory:/{mine.root}"
    run = Run(tmp_path, remote=mine.url)
    with run.keeper:
        run.observe(3.0, 2.0, 1.0)
    assert mine.objects() == local_files(tmp_path)
    assert neighbour.objects() == {"snapshots/U1/model.pt": b"of a neighbour"}


def test_local_damage_does_not_replace_a_whole_remote_copy(tmp_path, place):
    run = Run(tmp_path, remote=place.url)
    with run.keeper:
        run.observe(3.0)
    before = place.objects()
    file = tmp_path / "checkpoints" / "snapshots" / "U1" / "model.pt"
    whole = file.read_bytes()
    for damaged in (whole[:-10], b"", bytes([*whole[:-1], whole[-1] ^ 1])):  # the last has the right size
        file.write_bytes(damaged)
        again = Run(tmp_path, remote=place.url, resume="ledger")
        again.keeper.start()
        again.keeper.abandon()
        kept = {path: data for path, data in place.objects().items() if path.startswith("snapshots/")}
        assert kept == {path: data for path, data in before.items() if path.startswith("snapshots/")}
    place.remove("snapshots/U1/model.pt")
    with pytest.raises(StorageError, match=r"model.pt is damaged"):
        Run(tmp_path, remote=place.url, resume="ledger").keeper.start()
    assert "snapshots/U1/model.pt" not in place.objects()


def test_snapshot_that_is_missing_here_is_brought_back(tmp_path, place):
    run = Run(tmp_path, remote=place.url, tolerances=[0])
    with run.keeper:
        run.observe(3.0, 4.0, 1.0)
    snapshot = tmp_path / "checkpoints" / "snapshots" / "U1"
    for path in snapshot.iterdir():
        path.unlink()
    snapshot.rmdir()
    with Run(tmp_path, remote=place.url, tolerances=[0], resume="ledger").keeper:
        assert refs(tmp_path)[f"{BEST}.tolerance=0"] == "U1"
    assert verify(tmp_path) == verify(place.url) == []


def test_snapshot_that_is_missing_everywhere_is_not_named_there(tmp_path, place, caplog):
    run = Run(tmp_path)
    with run.keeper:
        run.observe(3.0)
    for path in (tmp_path / "checkpoints" / "snapshots" / "U1").iterdir():
        path.unlink()
    with pytest.raises(OSError, match="U1 cannot be read"):
        upload(tmp_path, place.url)
    assert place.objects() == {}
    assert "lags behind" not in caplog.text  # what is raised is not logged too


def test_second_run_is_refused_before_the_first_observes(tmp_path, place):
    first = Run(tmp_path / "first", remote=place.url)
    with first.keeper:
        with pytest.raises(RunExistsError, match="choose another remote"):
            Run(tmp_path / "second", remote=place.url).keeper.start()
        first.observe(1.0)
    assert place.objects() == local_files(tmp_path / "first")


def test_file_that_only_looks_like_one_of_this_run_is_replaced(tmp_path, place):
    twin = Run(tmp_path / "twin")
    twin.observe(3.0)
    size = (twin.keeper.best_path / "model.pt").stat().st_size
    run = Run(tmp_path / "run", remote=place.url)
    with run.keeper:
        place.put("snapshots/U1/model.pt", b"x" * size)
        run.observe(3.0)
    assert place.objects() == local_files(tmp_path / "run")


def test_copy_of_the_run_in_itself_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="a copy goes elsewhere"):
        Run(tmp_path, remote=f"file://{tmp_path}").keeper.start()
    other = Run(tmp_path / "run", remote=f"file://{tmp_path}/copy")
    with other.keeper:
        other.observe(1.0)
    assert verify(f"file://{tmp_path}/copy") == []


def test_failure_of_the_copy_does_not_keep_the_run_from_its_end(tmp_path, place, impatient, monkeypatch):
    run = Run(tmp_path, remote=place.url, tolerances=[5])
    run.observe(3.0)
    run.keeper._saver.arrive("wait")
    monkeypatch.setattr(Remote, "put", refuse(ConnectionError("cut")))
    run.observe(2.0, first=2)
    with pytest.raises(StorageError, match="cut"):
        run.keeper.close()
    assert refs(tmp_path) == {BEST: "U2", f"{BEST}.tolerance=5": "U2"}
    assert verify(tmp_path) == []
    assert broken_promises(place.objects()) == []


def refuse(error):
    def refused(*_):
        raise error

    return refused


def test_every_keeper_is_told_of_a_copy_that_lags_behind(tmp_path, place, impatient, monkeypatch, caplog):
    warned = Run(tmp_path, remote=place.url, on_save_error="warn")
    raised = Run(tmp_path, warned.model, metric_key="error", remote=place.url)
    with warned.keeper, pytest.raises(StorageError, match="cut"), raised.keeper:  # noqa: PT012  # at the second value
        warned.observe(3.0)
        raised.observe(3.0)
        raised.keeper._saver.arrive("wait")
        monkeypatch.setattr(Remote, "put", refuse(ConnectionError("cut")))
        warned.observe(2.0, first=2)
        with pytest.raises(OSError, match="cut"):
            warned.keeper._run.folder.copy.arrive()
        warned.observe(1.0, first=3)
        raised.observe(1.0, first=2)
    assert "training continues" in caplog.text


def test_upload_that_fails_after_the_patience_is_tried_again(tmp_path, place, monkeypatch):
    put, now, failures = Remote.put, [0.0], [ConnectionError("cut")]

    def slow(remote, file, path):
        now[0] += 1000.0
        if failures:
            raise failures.pop()
        put(remote, file, path)

    monkeypatch.setattr(Remote, "put", slow)
    with use(tmp_path, clock=lambda: now[0]):
        run = Run(tmp_path, remote=place.url)
        run.observe(3.0)
        run.keeper.close()
    assert place.objects() == local_files(tmp_path)


def test_storage_that_never_shows_what_it_has_taken_is_given_up(tmp_path, place, impatient, monkeypatch):
    run = Run(tmp_path, remote=place.url)
    run.keeper.start()
    monkeypatch.setattr(Remote, "sizes", lambda _: {})
    run.observe(3.0)
    with pytest.raises(StorageError, match="is not there"):
        run.keeper.close()


def test_storage_without_removals_costs_only_its_room(tmp_path, place, monkeypatch, caplog):
    monkeypatch.setattr(Remote, "remove", refuse(PermissionError("not yours")))
    run = Run(tmp_path, remote=place.url)
    with run.keeper as keeper:
        for number in (1, 2, 3):
            run.observe(-float(number), first=number)
            keeper._saver.arrive("wait")
    assert local_files(tmp_path).items() <= place.objects().items()
    assert "not yours" in caplog.text
    assert {fault.kind for fault in verify(place.url)} == {"unfinished"}


def test_reader_of_a_run_that_goes_on_finds_a_state_of_it(tmp_path, place, monkeypatch):
    run = Run(tmp_path, remote=place.url)
    get, values, numbers = Remote.get, [2.0, 1.0], itertools.count(2)

    def get_late(remote, path, file):
        if values:
            run.observe(values.pop(0), first=next(numbers))
            run.keeper._saver.arrive("wait")
        get(remote, path, file)

    with run.keeper as keeper:
        run.observe(3.0)
        keeper._saver.arrive("wait")
        monkeypatch.setattr(Remote, "get", get_late)
        model = nn.Linear(1, 1)
        loaded = load(place.url, BEST, model)
        assert (loaded.value, loaded.iteration) == (1.0, update(3))
        values = [0.5]
        assert verify(place.url) == []
        assert values == []


def test_abandoned_keeper_does_not_wait_for_its_upload(tmp_path, place, monkeypatch):
    monkeypatch.setattr(mirror, "_PATIENCE_AT_THE_END", 0.05)
    put, is_begun, may_end = Remote.put, threading.Event(), threading.Event()

    def slow(remote, file, path):
        if threading.current_thread().name == "keepbest-upload" and not may_end.is_set():
            is_begun.set()
            assert may_end.wait(60)
        put(remote, file, path)

    run = Run(tmp_path, remote=place.url)
    run.keeper.start()
    [uploader] = [thread for thread in threading.enumerate() if thread.name == "keepbest-upload"]
    monkeypatch.setattr(Remote, "put", slow)
    run.observe(3.0)
    assert is_begun.wait(60)
    before = place.objects()["ledger.jsonl"]
    run.keeper.abandon()
    may_end.set()
    uploader.join(60)
    assert place.objects()["ledger.jsonl"] == before
    with Run(tmp_path, remote=place.url, resume="ledger").keeper as keeper:
        assert keeper.state.best.value == 3.0
    assert place.objects() == local_files(tmp_path)


def test_copy_with_names_that_lead_out_of_it_writes_nowhere_else(tmp_path, place):
    run = Run(tmp_path / "run", remote=place.url)
    with run.keeper:
        run.observe(3.0)
    place.put(f"snapshots/U1/../../../../{tmp_path.name}-evil", b"evil")
    assert any(path.endswith("-evil") and "/../" in path for path in place.objects())
    elsewhere = tmp_path / "elsewhere"
    with Run(elsewhere, remote=place.url, resume="ledger").keeper:
        set_weights(run.model, 0.0)
        load(place.url, BEST, run.model)
    assert {path.name for path in elsewhere.rglob("*") if path.is_file()} == {
        "lock", "ledger.jsonl", "model.pt", "snapshot.json",
    }  # fmt: skip
    assert not list(tmp_path.parent.rglob("*evil"))


def test_copy_that_has_lost_a_snapshot_replaces_nothing_here(tmp_path, place):
    run = Run(tmp_path / "run", remote=place.url)
    with run.keeper:
        run.observe(3.0)
    lines = [json.loads(line) for line in place.objects()["ledger.jsonl"].splitlines()]
    assert any("snapshot" in line for line in lines)
    for path in list(place.objects()):
        if path.startswith("snapshots/"):
            place.remove(path)
    with pytest.raises(SnapshotError, match="has lost snapshot U1"):
        Run(tmp_path / "again", remote=place.url, resume="ledger").keeper.start()
    again = Run(tmp_path / "again")
    with again.keeper:  # the directory is as if nothing had happened
        again.observe(1.0)


@pytest.mark.parametrize(
    "refusal", [NotImplementedError(), TypeError("mode"), OSError(errno.EINVAL, "what is If-None-Match?")], ids=repr
)
def test_storage_without_conditional_writes_is_looked_at_first(tmp_path, place, refusal, monkeypatch):
    pipe = type(place.storage).pipe_file

    def refuse_conditions(storage, path, value, mode="overwrite"):
        if mode == "create":
            raise refusal
        pipe(storage, path, value)

    monkeypatch.setattr(type(place.storage), "pipe_file", refuse_conditions)
    remote = Remote(place.url)
    assert [remote.write_first_ledger(b"mine"), remote.write_first_ledger(b"other")] == [True, False]
    assert place.objects() == {"ledger.jsonl": b"mine"}


def test_first_ledger_that_does_not_get_through_keeps_its_condition(tmp_path, place, monkeypatch):
    pipe, modes = type(place.storage).pipe_file, []

    def lose_the_first(storage, path, value, mode="overwrite"):
        modes.append(mode)
        if len(modes) == 1:
            raise ConnectionError("cut")
        pipe(storage, path, value, mode=mode)

    monkeypatch.setattr(type(place.storage), "pipe_file", lose_the_first)
    with Run(tmp_path, remote=place.url).keeper:
        pass
    assert modes[:2] == ["create", "create"]

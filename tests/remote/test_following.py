"""A copy of a run in a remote storage: it ends like the run, and at any time what its ledger names is there, whole."""

from __future__ import annotations

import os
import shutil
import signal
import threading

import pytest
from botocore.exceptions import BotoCoreError, ClientError

from keepbest.errors import ConfigError, LedgerError, StorageError
from keepbest.remote.mirror import Mirror
from keepbest.remote.storage import Remote, part_bytes
from keepbest.remote.upload import upload
from keepbest.remote.verify import verify_run as verify
from tests.kit import toys
from tests.kit.pool import run_ranks, start_ranks
from tests.kit.runs import Run, update
from tests.kit.seams import use
from tests.remote.runs import broken_promises, local_files, ranks_that_keep_bests_until
from tests.remote.server import BUCKET, CREDENTIALS


def environment(place):
    # One attempt each, so that what the client cannot repair is ours to repair.
    return {**CREDENTIALS, "AWS_ENDPOINT_URL": place.link.url, "AWS_MAX_ATTEMPTS": "1"}


class Watch:
    """Looks at the objects of a place again and again, while the block lasts."""

    def __init__(self, place):
        self.place = place
        self.broken = []
        self.looks = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def look(self):
        try:
            before, between, after = (self.place.objects() for _ in range(3))
        except (BotoCoreError, ClientError):  # the server is down, or starting
            return
        if before.get("ledger.jsonl") == after.get("ledger.jsonl"):  # or the look between them is of two states
            self.broken += broken_promises(between)
            self.looks += 1

    def _look(self):
        while not self._is_over.wait(0.01):
            self.look()

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._is_over.set()
        self._thread.join()
        self.look()


def test_copy_ends_like_the_run_and_keeps_no_more(tmp_path, place):
    run = Run(tmp_path, remote=place.url, tolerances=[0], keep_top_k=2)
    with run.keeper:
        run.observe(5.0, 4.0, 6.0, 3.0, 7.0)
    assert place.objects() == local_files(tmp_path)
    assert place.snapshots() == {"U2", "U4"}


def test_large_file_is_uploaded_in_small_parts(tmp_path, place):
    (tmp_path / "file").write_bytes(data := os.urandom(40_000_000))
    Remote(place.url).put(tmp_path / "file", "file")
    head = place.server.client.head_object(Bucket=BUCKET, Key=f"{place.prefix}/checkpoints/file")
    assert head["ETag"].strip('"').endswith("-5")  # S3 puts the number of parts there
    assert place.objects()["file"] == data


@pytest.mark.parametrize("size", [0, 8 << 20, 80 << 30, 5 << 40])
def test_file_has_no_more_parts_than_s3_takes(size):
    assert size <= 10_000 * part_bytes(size)
    assert 5 << 20 <= part_bytes(size) <= 5 << 30  # its limits of one part


@pytest.mark.parametrize("loses", ["the network", "its memory"])
def test_storage_that_restarts_during_an_upload_is_completed(tmp_path, place, loses):
    directory = tmp_path / "run"
    arguments = (directory, place.url, environment(place), tmp_path)
    with start_ranks(ranks_that_keep_bests_until, 2, *arguments) as ranks, Watch(place) as watch:
        for rank in (0, 1):
            ranks.wait_for(rank, "before cut", timeout=60)
        place.wait_for_a_snapshot()
        place.link.cut_after(1_500_000)  # a snapshot has 2.8 MB
        (tmp_path / "cut").touch()
        for rank in (0, 1):
            ranks.wait_for(rank, "before repaired", timeout=60)  # training does not wait
        assert place.link.is_cut.wait(60)
        if loses == "its memory":
            place.server.kill()
            place.server.start()
            assert place.objects() == {}
        place.link.repair()
        (tmp_path / "repaired").touch()
        (tmp_path / "end").touch()
        outcomes = ranks.collect(timeout=120)
    assert [outcome.exception for outcome in outcomes] == [None, None]
    assert [outcome.result for outcome in outcomes] == [1.0, 1.0]
    assert watch.broken == []
    assert watch.looks > 1
    assert place.objects() == local_files(directory)
    assert verify(place.url) == []


def test_storage_that_forgets_what_it_has_just_confirmed(tmp_path, place, monkeypatch):
    put, losses, broken, looks = Remote.put, [place.server.forget], [], []

    def put_and_lose(remote, file, path):
        put(remote, file, path)
        if losses and "U1" in path:
            losses.pop()(place.prefix)

    def look_after(name):
        write = getattr(Remote, name)

        def write_and_look(remote, data):
            is_written = write(remote, data)
            broken.extend(broken_promises(place.objects()))
            looks.append(name)
            return is_written

        monkeypatch.setattr(Remote, name, write_and_look)

    monkeypatch.setattr(Remote, "put", put_and_lose)
    look_after("write_ledger")
    look_after("write_first_ledger")  # also where the ledger was lost too
    run = Run(tmp_path, remote=place.url)
    with run.keeper:
        run.observe(5.0)
    assert (losses, broken) == ([], [])
    assert looks.count("write_first_ledger") == 2
    assert place.objects() == local_files(tmp_path)


def test_lost_storage_ends_training_and_upload_makes_up_for_it(tmp_path, place):
    directory = tmp_path / "run"
    (tmp_path / "repaired").touch()
    (tmp_path / "end").touch()
    with start_ranks(failing_ranks, 2, directory, place.url, environment(place), tmp_path) as ranks:
        for rank in (0, 1):
            ranks.wait_for(rank, "before cut", timeout=60)
        place.link.cut_after(1)
        (tmp_path / "cut").touch()
        outcomes = ranks.collect(timeout=120)
    for outcome in outcomes:
        assert isinstance(outcome.exception, StorageError)
        assert place.url in str(outcome.exception)
        assert str(directory) in str(outcome.exception)
    place.link.repair()
    assert broken_promises(place.objects()) == []
    assert place.objects() != local_files(directory)
    upload(directory, place.url)
    assert place.objects() == local_files(directory)


def failing_ranks(*arguments):
    ranks_that_keep_bests_until(*arguments, patience=1.0)


def test_lost_storage_is_a_warning_where_training_continues(tmp_path, place, monkeypatch, caplog):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with use(tmp_path, patience=0.5):
        run = Run(tmp_path, remote=place.url, on_save_error="warn")
        with run.keeper:
            place.link.cut_after(1)
            run.observe(5.0)
            assert place.link.is_cut.wait(60)
    assert "lags behind" in caplog.text
    assert verify(tmp_path) == []
    place.link.repair()
    again = Run(tmp_path, remote=place.url, on_save_error="warn", resume="ledger")
    with again.keeper:
        again.observe(4.0, first=2)
    assert place.objects() == local_files(tmp_path)


def test_kill_during_an_upload_leaves_an_earlier_state(tmp_path, place):
    directory, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    with start_ranks(ranks_that_keep_bests_until, 2, directory, place.url, environment(place), tmp_path) as ranks:
        for rank in (0, 1):
            ranks.wait_for(rank, "before cut", timeout=60)
        place.wait_for_a_snapshot()
        place.link.cut_after(1_500_000)
        (tmp_path / "cut").touch()
        assert place.link.is_cut.wait(60)
        for rank in (0, 1):
            ranks.signal(rank, signal.SIGKILL)
        ranks.collect(timeout=60)
    place.link.repair()
    assert broken_promises(place.objects()) == []
    assert [fault for fault in verify(place.url) if fault.kind == "damage"] == []
    # On another machine, the copy is all that there is.
    run = Run(elsewhere, remote=place.url, tolerances=[1], resume="ledger")
    with run.keeper as keeper:
        found = keeper.state.best.value
        assert 1.0 <= found <= 9.0
    assert verify(elsewhere) == []
    assert place.objects() == local_files(elsewhere)


def test_missing_bucket_is_reported_on_every_rank_at_the_start(tmp_path, place):
    missing = "s3://no-such-bucket/run"
    with start_ranks(ranks_that_keep_bests_until, 2, tmp_path / "run", missing, environment(place), tmp_path) as ranks:
        outcomes = ranks.collect(timeout=60)
    for outcome in outcomes:
        assert isinstance(outcome.exception, StorageError)
        assert "bucket does not exist" in str(outcome.exception)
        assert missing in str(outcome.exception)


def test_another_run_in_the_same_place_is_noticed(tmp_path, place):
    run = Run(tmp_path / "run", remote=place.url)
    with pytest.raises(StorageError, match="another run goes there"), run.keeper:  # noqa: PT012  # at any of its calls
        run.observe(5.0)
        run.keeper._saver.arrive("wait")  # or the upload of the first best may replace what another run brings
        place.server.client.put_object(Bucket=BUCKET, Key=f"{place.prefix}/checkpoints/ledger.jsonl", Body=b"{}\n")
        run.observe(4.0, first=2)
    assert place.objects()["ledger.jsonl"] == b"{}\n"
    assert verify(tmp_path / "run") == []
    with pytest.raises(LedgerError):
        Run(tmp_path / "run", remote=place.url, resume="ledger").keeper.start()


def test_run_that_begins_at_the_same_moment_is_noticed(tmp_path, place, monkeypatch):
    refuse, other = Mirror._refuse_if_over, Run(tmp_path / "other", remote=place.url)

    def refuse_when_the_other_has_begun(mirror):  # it has seen that there is nothing, and is about to write
        monkeypatch.setattr(Mirror, "_refuse_if_over", refuse)
        other.observe(3.0)
        other.keeper.close()

    monkeypatch.setattr(Mirror, "_refuse_if_over", refuse_when_the_other_has_begun)
    with pytest.raises(StorageError, match="another run goes there"):
        Run(tmp_path / "run", remote=place.url).keeper.start()
    assert place.objects() == local_files(tmp_path / "other")


@pytest.mark.parametrize(
    ("remote", "reported"),
    [
        ("runs/a", "must be a URL"),
        ("gs://bucket/run", "gcsfs"),
        ("nosuchprotocol://bucket/run", "nosuchprotocol"),
    ],
)
def test_remote_that_cannot_be_opened_is_refused_at_the_start(tmp_path, remote, reported):
    with pytest.raises(ConfigError, match=reported):
        Run(tmp_path / "run", remote=remote)
    assert not (tmp_path / "run").exists()


def test_keepers_of_a_run_have_one_remote_copy(tmp_path, place):
    first = Run(tmp_path, remote=place.url)
    second = Run(tmp_path, metric_key="error", remote=f"{place.url}-2")
    with first.keeper, pytest.raises(ConfigError, match="one remote copy"):
        second.keeper.start()


def test_two_keepers_and_two_ranks_share_a_copy(tmp_path, place):
    run_ranks(two_keepers, 2, tmp_path, place.url, environment(place))
    assert place.objects() == local_files(tmp_path)
    assert place.snapshots() == {"U1", "U3"}


def two_keepers(directory, url, environment):
    os.environ.update(environment)
    first = Run(directory, remote=url)
    second = Run(directory, first.model, metric_key="accuracy", remote=url)
    with first.keeper, second.keeper:
        for number, (loss, accuracy) in enumerate([(3.0, 0.9), (2.0, 0.1), (1.0, 0.5)], start=1):
            first.observe(loss, first=number)
            second.keeper.observe(accuracy, update(number))  # of the weights that the first has saved


def test_trainer_starts_over_from_its_remote_copy(tmp_path, place):
    arguments = (tmp_path, place.url, environment(place))
    first = run_ranks(train, 2, *arguments)
    copied = place.objects()
    shutil.rmtree(tmp_path / "run")
    again = run_ranks(train, 2, *arguments)
    assert first == again
    assert verify(place.url) == verify(tmp_path / "run") == []
    assert place.objects()["ledger.jsonl"].startswith(copied["ledger.jsonl"])


def train(directory, url, environment):
    os.environ.update(environment)
    callbacks = [
        {"name": "OfflineLossCallback", "dataset_key": "val", "every_n_updates": 1},
        {"name": "BestCheckpointCallback", "metric_key": "loss/val/total", "every_n_updates": 1, "remote": url},
    ]
    trainer = toys.make_trainer(directory / "run", callbacks=callbacks, strategy="ddp", resume="auto")
    trainer.train()
    return trainer.callbacks[1].best_metric_value

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from keepbest.iteration import TrainingIteration
from keepbest.training.counter import UpdateCounter
from keepbest.training.log_writer import LoggedScalar, LogWriter
from keepbest.training.trackers import JsonLinesTracker, build_tracker
from tests.kit import toys


def make_writer(path: Path, *, is_main: bool = True) -> tuple[LogWriter, UpdateCounter]:
    counter = UpdateCounter(updates_per_epoch=2, effective_batch_size=8, end=TrainingIteration(epoch=9))
    return LogWriter(JsonLinesTracker(path), counter, is_main=is_main), counter


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("value", [0.5, torch.tensor(0.5), torch.tensor([0.5], dtype=torch.bfloat16)])
def test_what_is_logged_can_be_read_until_the_flush(value, tmp_path):
    writer, counter = make_writer(tmp_path / "log")
    counter.next_update()
    writer.add_scalar("loss", value, weight=3)
    expected = LoggedScalar(0.5, 3.0, TrainingIteration(epoch=0, update=1, sample=8))
    assert writer.log_cache == {"loss": expected}
    writer.flush()
    assert writer.log_cache == {}


def test_one_record_for_each_iteration(tmp_path):
    writer, counter = make_writer(tmp_path / "log")
    writer.add_scalar("a", 1)
    counter.next_update()
    counter.next_update()
    writer.add_scalar("b", 2.5)
    writer.add_scalar("c", 4.0)
    writer.add_scalar("c", 5.0)
    writer.flush()
    writer.flush()
    assert records(tmp_path / "log") == [
        {"epoch": 0, "update": 0, "sample": 0, "a": 1.0},
        {"epoch": 1, "update": 2, "sample": 16, "b": 2.5, "c": 5.0},
    ]


def test_what_the_disk_refuses_is_written_once_it_can_be(tmp_path, caplog):
    log = tmp_path / "log"
    log.mkdir()  # in the place of the file
    writer, counter = make_writer(log)
    for value in (1.0, 2.0):
        counter.next_update()
        writer.add_scalar("loss", value)
        writer.flush()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Is a directory" in caplog.text
    log.rmdir()
    counter.next_update()
    writer.add_scalar("loss", 3.0)
    writer.flush()
    assert [(record["update"], record["loss"]) for record in records(log)] == [(1, 1.0), (2, 2.0), (3, 3.0)]


MANY = 12_000


def refuse_many(folder, caplog):
    """A writer of 12,000 records that cannot be written, and where they belong."""
    (log := folder / "log").mkdir()
    writer, counter = make_writer(log)
    for number in range(1, MANY + 1):
        counter.next_update()
        writer.add_scalar("loss", float(number))
        writer.flush()
    [warning] = caplog.records
    assert "the newest 10000 records are kept" in warning.getMessage()
    caplog.clear()
    return log, writer


def test_of_many_records_the_newest_are_kept(tmp_path, caplog):
    log, writer = refuse_many(tmp_path, caplog)
    log.rmdir()
    writer.flush()
    assert [record["loss"] for record in records(log)] == [float(number) for number in range(MANY - 9999, MANY + 1)]
    [warning] = [record.getMessage() for record in caplog.records]
    assert "It lacks 2000 records, those of E0_U1_S8 to E1000_U2000_S16000" in warning
    writer.flush()
    writer.close()
    assert len(caplog.records) == 1


def test_all_records_that_are_lost_are_counted(tmp_path, caplog):
    _, writer = refuse_many(tmp_path, caplog)
    writer.close()
    [warning] = [record.getMessage() for record in caplog.records]
    assert "12000 records could not be written, and are lost" in warning


def test_what_is_lost_at_the_end_is_a_warning(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").mkdir()
    trainer = toys.make_trainer(tmp_path, epochs=2, tracker="jsonl")
    trainer.train()
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [text.partition(":")[0] for text in warnings] == [
        "what is logged cannot be written, and the newest 10000 records are kept until it can be",
        "of what was logged 2 records could not be written, and are lost",
    ]


def test_other_ranks_write_nothing(tmp_path):
    writer, _ = make_writer(tmp_path / "log", is_main=False)
    writer.add_scalar("a", 1)
    writer.flush()
    assert writer.log_cache == {}
    assert list(tmp_path.iterdir()) == []


def test_prefixes_add_up_and_share_the_cache(tmp_path):
    writer, _ = make_writer(tmp_path / "log")
    writer.prefixed("best=loss.val/").prefixed("again/").add_scalar("loss/test", 1.0, weight=2.0)
    assert writer.log_cache["best=loss.val/again/loss/test"].weight == 2.0


def test_numbers_that_are_not_finite_are_logged(tmp_path):
    writer, _ = make_writer(tmp_path / "log")
    for key, value in {"nan": math.nan, "inf": math.inf, "minus": -math.inf}.items():
        writer.add_scalar(key, value)
    writer.flush()
    [record] = records(tmp_path / "log")
    assert (record["nan"], record["inf"], record["minus"]) == ("nan", "inf", "-inf")


@pytest.mark.parametrize("value", ["0.5", None, torch.zeros(2), [1.0]])
def test_what_is_no_number_is_refused(value, tmp_path):
    writer, _ = make_writer(tmp_path / "log")
    with pytest.raises(TypeError, match="'loss': expected a"):
        writer.add_scalar("loss", value)


def test_torn_last_line_does_not_swallow_the_next_record(tmp_path):
    path = tmp_path / "log"
    path.write_text('{"epoch": 0, "up')
    JsonLinesTracker(path).log(TrainingIteration(update=4), {"a": 1.0})
    assert json.loads(path.read_text().splitlines()[1]) == {"epoch": None, "update": 4, "sample": None, "a": 1.0}


def test_tensorboard_gets_every_scalar_at_its_update(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = build_tracker("tensorboard", tmp_path, is_main=True)
    tracker.resume_from(TrainingIteration(epoch=0, update=3, sample=6))
    tracker.log(TrainingIteration(epoch=0, update=4, sample=8), {"loss/val/total": 0.25})
    tracker.close()
    tracker.log(TrainingIteration(epoch=0, update=6, sample=12), {"loss/val/total": 0.125})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/val/total")] == [(4, 0.25), (6, 0.125)]


@pytest.mark.parametrize(("name", "is_main"), [("none", True), ("jsonl", False), ("tensorboard", False)])
def test_no_tracker_leaves_no_trace(name, is_main, tmp_path):
    tracker = build_tracker(name, tmp_path, is_main=is_main)
    tracker.log(TrainingIteration(update=1), {"a": 1.0})
    tracker.close()
    assert list(tmp_path.iterdir()) == []

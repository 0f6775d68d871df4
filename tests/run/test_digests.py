"""Digests of what is written, some of it on a thread beside the write."""

from __future__ import annotations

import _thread
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
import xxhash
from torch import nn

from keepbest import BestKeeper, load
from keepbest.run.digest import DigestingFile
from keepbest.run.files import Files
from tests.kit.files import SteppedFiles, before

MIB = 1 << 20
LARGE = bytes(range(256)) * (5 * MIB // 256)
PIECES = [bytes([number]) * size for number, size in enumerate((10, 5 * MIB, 1 << 16, 3, 4 * MIB, MIB, 9 * MIB + 1))]


def written(path: Path, files: Files, pieces=PIECES, *, is_waited_for: bool):
    with files.create(path) as file:
        sink = DigestingFile(file, is_waited_for=is_waited_for)
        for piece in pieces:
            sink.write(memoryview(piece))
        sink.sync()
    return sink.digest


@pytest.fixture(autouse=True)
def two_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})


@pytest.fixture
def started(monkeypatch):
    """What was given to threads that nobody waits for to begin."""
    functions, start = [], _thread.start_new_thread

    def note_and_start(function, arguments):
        functions.append(function)
        return start(function, arguments)

    monkeypatch.setattr(_thread, "start_new_thread", note_and_start)
    return functions


@pytest.mark.parametrize("is_waited_for", [False, True])
def test_digest_is_that_of_the_bytes_of_the_file(tmp_path, started, is_waited_for):
    digest = written(tmp_path / "file", Files(), is_waited_for=is_waited_for)
    content = b"".join(PIECES)
    assert (tmp_path / "file").read_bytes() == content
    assert (digest.bytes, digest.digest) == (len(content), xxhash.xxh3_128_hexdigest(content))
    assert bool(started) is is_waited_for


def test_digest_without_a_thread_that_can_be_started(tmp_path, monkeypatch):
    def refuse(_function, _arguments):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    digest = written(tmp_path / "file", Files(), is_waited_for=True)
    assert digest.digest == xxhash.xxh3_128_hexdigest(b"".join(PIECES))


def test_thread_that_begins_too_late_digests_nothing(tmp_path, monkeypatch):
    late = []
    monkeypatch.setattr(_thread, "start_new_thread", lambda function, _: late.append(function))
    with Files().create(tmp_path / "file") as file:
        sink = DigestingFile(file, is_waited_for=True)
        sink.write(LARGE)
        for function in late:
            thread = threading.Thread(target=function)
            thread.start()
            thread.join()
        sink.sync()
    assert late
    assert sink.digest.digest == xxhash.xxh3_128_hexdigest(LARGE)


def test_no_thread_where_there_is_one_cpu(tmp_path, started, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    digest = written(tmp_path / "file", Files(), is_waited_for=True)
    assert digest.digest == xxhash.xxh3_128_hexdigest(b"".join(PIECES))
    assert not started


class Reader:
    """Digests when it may, and says whether it reads."""

    def __init__(self):
        self.is_reading, self.has_begun, self.may_end = False, threading.Event(), threading.Event()

    def update(self, _data):
        self.is_reading = True
        self.has_begun.set()
        self.may_end.wait(60)
        self.is_reading = False


@pytest.fixture
def reader(monkeypatch):
    made = Reader()
    monkeypatch.setattr("keepbest.run.digest.xxhash.xxh3_128", lambda: made)
    return made


def test_refused_write_waits_until_nobody_reads(tmp_path, reader):
    def refuse(operation):
        if operation.name == "write":
            assert reader.has_begun.wait(60)
            threading.Timer(0.2, reader.may_end.set).start()
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        written(tmp_path / "file", SteppedFiles(before(refuse)), [LARGE], is_waited_for=True)
    assert reader.has_begun.is_set()
    assert not reader.is_reading


def test_interrupted_write_waits_until_nobody_reads(tmp_path, reader):
    def interrupt_later(operation):
        if operation.name == "write":
            assert reader.has_begun.wait(60)
            for delay in (0.1, 0.2, 0.3):
                threading.Timer(delay, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()
            threading.Timer(0.5, reader.may_end.set).start()

    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "file", SteppedFiles(before(interrupt_later)), [LARGE], is_waited_for=True)
    assert reader.has_begun.is_set()
    assert not reader.is_reading


def test_digest_that_fails_on_the_thread_is_raised(tmp_path, reader):
    def fail(_data):
        raise MemoryError("no more")

    reader.update = fail
    with pytest.raises(MemoryError, match="no more"):
        written(tmp_path / "file", Files(), [LARGE], is_waited_for=True)


@pytest.mark.parametrize("file_format", ["torch", "safetensors", "dcp"])
@pytest.mark.parametrize("async_save", [False, True])
def test_no_thread_digests_beside_training(tmp_path, started, file_format, async_save):
    model, same = nn.Linear(2048, 1024, bias=False), nn.Linear(2048, 1024, bias=False)
    with BestKeeper(model, directory=tmp_path, metric_key="loss", format=file_format, async_save=async_save) as keeper:
        keeper.observe(1.0, epoch=1)
        keeper.flush()
    assert bool(started) is not async_save
    load(tmp_path, "best_model.loss", same)
    assert torch.equal(model.weight, same.weight)

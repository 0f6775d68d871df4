"""Digests of what is written, some of it on a thread beside the write."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
import xxhash
from torch import nn

from keepbest import BestKeeper, load
from keepbest.run.digest import DigestingFile
from keepbest.run.files import Files
from keepbest.worker import Threaded
from tests.kit.files import SteppedFiles, before

MIB = 1 << 20
PIECES = [bytes([number]) * size for number, size in enumerate((10, 5 * MIB, 1 << 16, 3, 4 * MIB, MIB, 9 * MIB + 1))]


def written(path: Path, files: Files, *, is_waited_for: bool):
    with files.create(path) as file:
        sink = DigestingFile(file, is_waited_for=is_waited_for)
        for piece in PIECES:
            sink.write(memoryview(piece))
        sink.sync()
    return sink.digest


@pytest.fixture
def started(monkeypatch):
    """Names of the threads that were started."""
    names, start = [], threading.Thread.start

    def note_and_start(thread):
        names.append(thread.name)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", note_and_start)
    return names


@pytest.mark.parametrize("is_waited_for", [False, True])
def test_digest_is_that_of_the_bytes_of_the_file(tmp_path, started, is_waited_for):
    digest = written(tmp_path / "file", Files(), is_waited_for=is_waited_for)
    content = b"".join(PIECES)
    assert (tmp_path / "file").read_bytes() == content
    assert (digest.bytes, digest.digest) == (len(content), xxhash.xxh3_128_hexdigest(content))
    assert bool(started) is is_waited_for


def test_digest_without_a_thread_that_can_be_started(tmp_path, monkeypatch):
    def refuse(_thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    digest = written(tmp_path / "file", Files(), is_waited_for=True)
    assert digest.digest == xxhash.xxh3_128_hexdigest(b"".join(PIECES))


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["refused", "interrupted"])
def test_write_that_fails_leaves_nobody_who_reads(tmp_path, started, error):
    def fail(operation):
        if operation.name == "write" and started:
            raise error

    with pytest.raises(type(error)):
        written(tmp_path / "file", SteppedFiles(before(fail)), is_waited_for=True)
    assert started
    assert not [thread for thread in threading.enumerate() if thread.name in started]


def test_interruptions_of_the_wait_leave_nobody_who_reads(tmp_path, started, monkeypatch):
    close, interruptions = Threaded.close, iter(range(3))

    def interrupt_or_close(thread):
        if next(interruptions, None) is not None:
            raise KeyboardInterrupt
        return close(thread)

    monkeypatch.setattr(Threaded, "close", interrupt_or_close)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "file", Files(), is_waited_for=True)
    assert started
    assert not [thread for thread in threading.enumerate() if thread.name in started]


@pytest.mark.parametrize("file_format", ["torch", "safetensors", "dcp"])
@pytest.mark.parametrize("async_save", [False, True])
def test_no_thread_digests_beside_training(tmp_path, started, file_format, async_save):
    model = nn.Linear(2048, 1024, bias=False)
    with BestKeeper(model, directory=tmp_path, metric_key="loss", format=file_format, async_save=async_save) as keeper:
        keeper.observe(1.0, epoch=1)
        keeper.flush()
    assert ("keepbest-digest" in started) is not async_save
    assert torch.equal(model.weight, keeper_weight(tmp_path))


def keeper_weight(folder: Path):
    model = nn.Linear(2048, 1024, bias=False)
    load(folder, "best_model.loss", model)
    return model.weight

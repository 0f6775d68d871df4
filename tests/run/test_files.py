"""What a large file costs the disk and the memory on its way, and that no link leads it elsewhere."""

from __future__ import annotations

import errno
import os

import pytest

from keepbest.run.files import Files

BYTES = 80 << 20


@pytest.fixture
def advice(monkeypatch):
    """The ranges that the kernel was asked to write, which no file shows afterwards."""
    ranges = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _descriptor, start, size, _kind: ranges.append((start, size)))
    return ranges


def write(path, chunk):
    with Files().create(path) as file:
        for _ in range(BYTES // chunk):
            file.write(bytes(chunk))
        file.sync()
    return path.stat().st_size


@pytest.mark.parametrize("chunk", [1 << 20, 40 << 20])
def test_disk_begins_before_all_of_a_large_file_is_written(tmp_path, advice, chunk):
    assert write(tmp_path / "large", chunk) == BYTES
    starts, sizes = zip(*advice, strict=True)
    assert starts == tuple(sum(sizes[:number]) for number in range(len(sizes)))
    assert BYTES // 2 < sum(sizes) <= BYTES


def test_file_system_that_takes_no_advice_is_written_all_the_same(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "posix_fadvise", refuse)  # as some file systems do, and none here
    assert write(tmp_path / "large", 40 << 20) == BYTES
    monkeypatch.delattr(os, "posix_fadvise")  # as where there is none
    assert write(tmp_path / "larger", 40 << 20) == BYTES


def test_file_is_not_written_through_a_link(tmp_path):
    (tmp_path / "victim").write_text("years")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        Files().append(tmp_path / "link")
    assert (tmp_path / "victim").read_text() == "years"

"""The folder of resume checkpoints outlives a kill at each of its operations."""

from __future__ import annotations

import shutil
from contextlib import suppress

import pytest

from keepbest.callbacks.resume_folder import STATE_FILE, ResumeFolder
from keepbest.run.files import Files
from tests.kit.files import Fault, SteppedFiles, before
from tests.kit.seams import use

NAME = "E1_U2"


class Killed(BaseException):
    """Ends the process in the middle of an operation."""


def publish(directory, files, content, name=NAME):
    with use(directory, files=files):
        folder = ResumeFolder(directory)
        folder.begin(name)
        for file in (".metadata", STATE_FILE):
            folder.write(name, file, content)
        folder.publish(name, keep_last=2)


def operations(directory):
    done = []
    publish(directory, SteppedFiles(before(done.append)), b"0")
    publish(directory, SteppedFiles(before(done.append)), b"1")
    return len(done)


def killed_at(count):
    left = [count]

    def count_down(_):
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    return SteppedFiles(before(count_down))


def test_checkpoint_is_published_again_after_two_kills(tmp_path):
    for count in range(operations(tmp_path / "whole")):
        directory = tmp_path / str(count)
        publish(directory, SteppedFiles(before(lambda _: None)), b"0")
        for _ in range(2):  # the second finds what the first has left
            with suppress(Killed):
                publish(directory, killed_at(count), b"1")
        publish(directory, SteppedFiles(before(lambda _: None)), b"2")
        found = ResumeFolder(directory).find("auto")
        assert (found / STATE_FILE).read_bytes() == b"2"
        assert sorted(path.name for path in (directory / "resume").iterdir()) == [NAME, "latest"]


@pytest.mark.parametrize("name", ["latest.tmp", f"{NAME}.tmp", f"{NAME}.replaced.tmp"])
def test_leftover_of_a_killed_process_is_no_obstacle(name, tmp_path):
    files = SteppedFiles(before(lambda _: None))
    publish(tmp_path, files, b"0")
    (tmp_path / "resume" / name).mkdir()
    (tmp_path / "resume" / name / "left").touch()
    publish(tmp_path, files, b"1")
    assert (ResumeFolder(tmp_path).find("auto") / STATE_FILE).read_bytes() == b"1"


def test_latest_is_found_where_links_are_refused(tmp_path, caplog):
    fault = Fault("link")
    files = SteppedFiles(before(fault))
    publish(tmp_path, files, b"0", "E1_U2")
    fault.last = 10**9
    fault.first = fault.calls["link"] + 1
    for content in (b"1", b"2"):
        publish(tmp_path, files, content, "E2_U4")
        assert (ResumeFolder(tmp_path).find("auto") / STATE_FILE).read_bytes() == content
    assert sum("no link can be made" in record.message for record in caplog.records) == 2  # one for each process


def test_copy_with_links_followed_takes_the_next_checkpoint(tmp_path):
    publish(tmp_path / "run", Files(), b"0")
    shutil.copytree(tmp_path / "run", tmp_path / "copy", symlinks=False)
    publish(tmp_path / "copy", Files(), b"1", "E2_U4")
    assert (ResumeFolder(tmp_path / "copy").find("auto") / STATE_FILE).read_bytes() == b"1"
    assert (tmp_path / "copy/resume/latest").is_symlink()

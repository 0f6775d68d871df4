"""What a process that was killed leaves of an export: the next one to the same place removes it, and nothing else."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from keepbest.errors import ConfigError
from keepbest.export import export
from keepbest.run.appearing import space_beside
from keepbest.run.files import Files
from tests.kit.pool import start_ranks
from tests.kit.runs import Run

BEST = "best_model.loss"
PLACES = ["best.pt", "best.safetensors", "out"]


@pytest.fixture
def run(tmp_path):
    kept = Run(tmp_path / "run")
    with kept.keeper:
        kept.observe(1.0)
    return tmp_path / "run"


def export_until_killed(run: Path, to: Path) -> None:
    """Dies when everything is written and nothing has its name."""

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    Path.hardlink_to = die
    export(run, BEST, to, largest_file=4)


def kill_an_export(run: Path, to: Path) -> set[str]:
    """What it leaves."""
    before = set(to.parent.rglob("*"))
    with start_ranks(export_until_killed, 1, run, to) as ranks:
        [outcome] = ranks.collect(timeout=60)
    assert outcome.exit_code == -signal.SIGKILL
    return {path.relative_to(to.parent).as_posix() for path in set(to.parent.rglob("*")) - before}


@pytest.mark.parametrize("name", PLACES)
def test_next_export_removes_what_a_killed_one_left(name, run, tmp_path):
    left = kill_an_export(run, tmp_path / name)
    assert all(".tmp-" in each for each in left - {"out"}), "nothing has its name yet"
    assert left - {"out"}
    [*written] = export(run, BEST, tmp_path / name, largest_file=4)
    assert not list(tmp_path.rglob(".tmp-*"))
    assert {path.name for path in written} <= {path.name for path in tmp_path.rglob("*")}


@pytest.mark.parametrize("name", PLACES[:2])
def test_export_that_runs_is_left_alone(name, run, tmp_path, monkeypatch):
    """Another export begins, and ends, when one has written everything."""
    link, found = Path.hardlink_to, []

    def export_meanwhile(path, target):
        monkeypatch.setattr(Path, "hardlink_to", link)
        found.extend(export(run, BEST, tmp_path / name))
        found.append(target.exists())
        link(path, target)

    monkeypatch.setattr(Path, "hardlink_to", export_meanwhile)
    with pytest.raises(ConfigError, match="exists; nothing is overwritten"):
        export(run, BEST, tmp_path / name)
    assert found[-1], "what was written is still there"
    assert all(path.exists() for path in found[:-1])
    assert not list(tmp_path.rglob(".tmp-*"))


def test_folder_of_one_export_alone_appears(run, tmp_path, monkeypatch):
    """Others, with files of other sizes, begin when one writes, and when it names its files."""
    link, create, found, written = Path.hardlink_to, Files.create, [], []

    def export_meanwhile(path, target):
        monkeypatch.setattr(Path, "hardlink_to", link)
        with pytest.raises(ConfigError, match=r"another export is about to appear in .*out; nothing"):
            export(run, BEST, tmp_path / "out", largest_file=4)
        found.append(target.exists())
        link(path, target)

    def export_and_begin_another(files, path):
        monkeypatch.setattr(Files, "create", create)
        monkeypatch.setattr(Path, "hardlink_to", export_meanwhile)
        written.extend(export(run, BEST, tmp_path / "out"))
        return create(files, path)

    monkeypatch.setattr(Files, "create", export_and_begin_another)
    with pytest.raises(ConfigError, match="out holds weights; nothing is overwritten"):
        export(run, BEST, tmp_path / "out", largest_file=4)
    assert found == [True], "what was written is still there"
    assert [*(tmp_path / "out").iterdir()] == written == [tmp_path / "out" / "model.safetensors"]


def test_only_what_is_left_of_the_same_place_is_removed(run, tmp_path):
    for name in ("best.pt", "other.pt"):
        kill_an_export(run, tmp_path / name)
    mine = tmp_path / ".tmp-best.pt.notes"
    mine.write_text("a file of somebody else")
    export(run, BEST, tmp_path / "best.pt")
    assert [path.name.rpartition(".")[0] for path in tmp_path.glob(".tmp-*/")] == [".tmp-other.pt"]
    assert mine.read_text() == "a file of somebody else"


def test_space_is_new_where_another_takes_it_for_left(tmp_path, monkeypatch):
    """The other one comes between the making of a space and its lock."""
    mkdir, spaces = Path.mkdir, []

    def lose_the_first(path, *arguments, **options):
        mkdir(path, *arguments, **options)
        spaces.append(path)
        if len(spaces) == 1:
            with space_beside(tmp_path / "best.pt", Files()):
                assert not path.exists()

    monkeypatch.setattr(Path, "mkdir", lose_the_first)
    with space_beside(tmp_path / "best.pt", Files()) as space:
        torch.save({}, space / "best.pt")
    assert len(spaces) == 3
    assert space == spaces[2]
    assert list(tmp_path.iterdir()) == []


def test_folder_without_locks_is_never_taken_for_left(run, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(9, "Bad file descriptor")  # as NFS has it

    left = kill_an_export(run, tmp_path / "best.pt")
    monkeypatch.setattr("fcntl.flock", refuse)
    export(run, BEST, tmp_path / "best.pt")
    assert {path.name for path in tmp_path.glob(".tmp-*")} == {each for each in left if "/" not in each}


@pytest.mark.parametrize("name", PLACES)
def test_space_that_cannot_be_removed_is_a_warning(name, run, tmp_path, monkeypatch, caplog):
    """What another user left is theirs, and a network may hold on to what was just written."""
    kill_an_export(run, tmp_path / name)
    remove = Files.remove

    def refuse(files, path):
        if path.name.startswith(".tmp-"):
            raise PermissionError(13, "Permission denied", path)
        remove(files, path)

    monkeypatch.setattr(Files, "remove", refuse)
    written = export(run, BEST, tmp_path / name)
    assert all(path.exists() for path in written)
    left = sorted(map(str, tmp_path.rglob(".tmp-*/")))
    assert sorted(record.args[0].as_posix() for record in caplog.records) == [each.rstrip("/") for each in left]
    assert len(left) == 2

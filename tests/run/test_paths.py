"""Paths are what they were when they were given: the working directory may change, and `~` is the home."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from keepbest import BestKeeper, abandon, load, open_run
from keepbest.errors import ConfigError, StorageError
from keepbest.export import export
from keepbest.remote.storage import local_path
from keepbest.run.verify import verify
from tests.faults.filled_run import VALUES, go_on, keeper_of, net, refs_hold
from tests.kit.cli_runs import keepbest
from tests.kit.pool import run_ranks

BEST = "best_model.loss"


def move_between_steps(root: Path, file_format: str, settings) -> Path:
    """Changes the working directory after each step. Only with dcp do all ranks need the same directory."""
    first = root / ("0" if file_format == "dcp" else str(dist.get_rank()))
    places = [first, root / "b", root / "c"]
    for place in places:
        place.mkdir(exist_ok=True)
    os.chdir(first)
    model = nn.Linear(2, 2)
    nn.init.ones_(model.weight)
    nn.init.ones_(model.bias)
    keeper = BestKeeper(model, directory="run", metric_key="loss", format=file_format, **settings)
    os.chdir(places[1])
    keeper.start()
    for epoch, place in enumerate(places, start=1):
        keeper.observe(1.0 / epoch, epoch=epoch)
        os.chdir(place)
    keeper.flush()
    os.chdir(places[2])
    keeper.restore_best()
    keeper.close()
    return keeper.best_path


@pytest.mark.parametrize(
    ("file_format", "settings"),
    [("torch", {}), ("safetensors", {"async_save": True}), ("dcp", {"remote": "file://run-copy"})],
)
def test_run_stays_where_it_began_on_every_rank(file_format, settings, tmp_path):
    paths = run_ranks(move_between_steps, 2, tmp_path, file_format, settings)
    second = "0" if file_format == "dcp" else "1"
    assert paths == [tmp_path / rank / "run/checkpoints/snapshots/E3" for rank in ("0", second)]
    assert verify(tmp_path / "0/run") == []
    assert (tmp_path / "0/run-copy").exists() == ("remote" in settings)
    assert [path.name for path in tmp_path.rglob("run")] == ["run"]
    assert not list((tmp_path / "b").iterdir()) + list((tmp_path / "c").iterdir())


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home, and a working directory elsewhere."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    yield tmp_path / "home"
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_home_is_expanded_wherever_a_path_is_given(home):
    model = nn.Linear(2, 2)
    with BestKeeper(model, directory="~/run", metric_key="loss") as keeper:
        keeper.observe(1.0, epoch=1)
    assert keeper.best_path == home / "run/checkpoints/snapshots/E1"
    assert load("~/run", BEST, model).path == keeper.best_path
    export("~/run", BEST, Path("~/model.pt"))
    assert torch.load(home / "model.pt", weights_only=True).keys() == model.state_dict().keys()


def test_what_is_no_path_of_this_machine_is_refused():
    for given in ("s3://bucket/run", Path("s3://bucket/run"), "~nobody-of-this-name/run"):
        with pytest.raises(ConfigError):
            local_path(given)


PATHS_OF_NOTHING = {
    "a loop of links": (lambda folder: folder / "one" / "run", "remove one of the links"),
    "a NUL": (lambda folder: folder / "a\0b", "give another path"),
    "not UTF-8": (lambda folder: folder / os.fsdecode(b"caf\xe9"), "give another path"),
    "too long": (lambda folder: folder / ("x" * 256), "give a shorter one"),
    "None": (lambda _: None, "a pathlib.Path"),
    "bytes": (os.fsencode, "a pathlib.Path"),
}


@pytest.mark.parametrize("kind", PATHS_OF_NOTHING)
def test_path_that_nothing_can_have_is_refused_by_name(kind, tmp_path):
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    (make, remedy), model = PATHS_OF_NOTHING[kind], nn.Linear(2, 2)
    given = make(tmp_path)
    ways = {
        "a keeper": lambda: BestKeeper(model, directory=given, metric_key="loss"),
        "load": lambda: load(given, BEST, model),
        "open_run": lambda: open_run(given),
        "abandon": lambda: abandon(given),
        "export": lambda: export(given, BEST, tmp_path / "model.pt"),
    }
    for way, use in ways.items():
        with pytest.raises(ConfigError) as caught:
            use()
        shown = f"{given!r}" if kind in ("None", "bytes") else str(given).encode("unicode_escape").decode()
        assert shown in str(caught.value), way
        assert remedy in str(caught.value), way
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize("command", ["show", "verify", "repair", "export"])
def test_command_names_a_path_that_leads_in_circles(command, tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "run")
    more = [BEST, "--to", str(tmp_path / "model.pt")] if command == "export" else []
    done = keepbest(command, str(tmp_path / "run"), *more)
    said = re.sub(r"\s+", " ", done.stderr)
    assert done.exit_code == 1
    assert f"error: there can be nothing at {tmp_path / 'run'}: Too many levels of symbolic links" in said


def use_a_directory_that_is_gone(folder: Path) -> list[str]:
    os.chdir(folder)
    folder.rmdir()
    found = []
    for use in (partial(BestKeeper, nn.Linear(1, 1), directory="run", metric_key="loss"), partial(open_run, "run")):
        with pytest.raises(ConfigError) as caught:
            use()
        found.append(str(caught.value))
    return found


def test_relative_path_needs_a_present_directory(tmp_path):
    (tmp_path / "gone").mkdir()
    [found] = run_ranks(use_a_directory_that_is_gone, 1, tmp_path / "gone")
    assert found == ["'run' cannot be found, since the present directory was removed: give an absolute path"] * 2


IN_ASCII = """
import sys, torch
from keepbest import BestKeeper
BestKeeper(torch.nn.Linear(1, 1), directory=sys.argv[1], metric_key="loss")
"""


def test_name_in_another_encoding_of_the_process_is_refused(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", IN_ASCII, str(tmp_path / "\u00fc")],
        env={**os.environ, "LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "ConfigError" in ended.stderr
    assert "set PYTHONUTF8=1, since this process takes the names of files for ascii" in ended.stderr


@pytest.mark.parametrize("settings", [{}, {"async_save": True}, {"format": "dcp"}], ids=["waits", "background", "dcp"])
def test_run_that_is_moved_away_and_back_continues(settings, tmp_path):
    run, elsewhere, model = tmp_path / "run", tmp_path / "elsewhere", net()
    keeper = keeper_of(run, model, **settings)
    go_on(keeper, model, VALUES[:2])
    keeper.flush()
    run.rename(elsewhere)

    def observe_and_wait() -> None:
        go_on(keeper, model, VALUES[:5])
        keeper.flush()

    with pytest.raises(StorageError, match="put back what was there"):
        observe_and_wait()
    assert not run.exists()
    elsewhere.rename(run)
    with keeper:
        go_on(keeper, model)
    assert verify(run) == []
    assert refs_hold(run)["best_model.loss"] == 8

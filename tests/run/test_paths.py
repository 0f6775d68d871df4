"""Paths are what they were when they were given: the working directory may change, and `~` is the home."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from keepbest import BestKeeper, load
from keepbest.errors import ConfigError
from keepbest.export import export
from keepbest.remote.storage import local_path
from keepbest.run.verify import verify
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

"""A damaged snapshot: errors say what can be done, and that helps."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from keepbest import average, load
from keepbest.cli.app import app
from keepbest.errors import SnapshotError
from keepbest.export import export
from keepbest.run.verify import verify
from tests.kit.pool import run_ranks
from tests.kit.runs import Run, set_weights

BEST = "best_model.loss"
EARLIER = f"{BEST}.tolerance=0"
USES = {
    "load": lambda run, _: load(run, BEST, nn.Linear(1, 1)),
    "export": lambda run, to: export(run, BEST, to),
    "average": lambda run, to: average(run, to, top=2),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def damaged(tmp_path):
    """A run with a copy, whose best is damaged here."""
    run = Run(tmp_path / "run", remote=f"file://{tmp_path}/copy", tolerances=[0], keep_top_k=2)
    with run.keeper:
        run.observe(3.0, 4.0, 2.0)
    flip(run.keeper.best_path / "model.pt")
    return run


@pytest.mark.parametrize("use", USES)
def test_error_of_damage_says_what_to_do(use, damaged, tmp_path):
    directory = tmp_path / "run"
    with pytest.raises(SnapshotError) as raised:
        USES[use](directory, tmp_path / "best.pt")
    message = str(raised.value)
    assert "U3/model.pt is damaged" in message
    assert message.count("Load another ref") == 1
    for command in ("show", "verify"):
        arguments = message.partition(f"python -m keepbest {command} ")[2].split(")")[0].split()
        assert CliRunner().invoke(app, [command, *arguments]).exit_code == (command == "verify"), message


def test_manifest_that_is_damaged_says_what_to_do(damaged, tmp_path):
    flip(damaged.keeper.best_path / "snapshot.json")
    with pytest.raises(SnapshotError, match=r"snapshot.json is damaged.*Load another ref"):
        load(tmp_path / "run", BEST, damaged.model)


def test_what_the_error_advises_brings_the_weights_back(damaged, tmp_path):
    load(tmp_path / "run", EARLIER, damaged.model)
    assert damaged.model.weight.item() == 1
    load(f"file://{tmp_path}/copy", BEST, damaged.model)
    assert damaged.model.weight.item() == 3
    shutil.rmtree(damaged.keeper.best_path)
    with Run(tmp_path / "run", remote=f"file://{tmp_path}/copy", resume="ledger", tolerances=[0], keep_top_k=2).keeper:
        pass
    set_weights(damaged.model, 9)
    load(tmp_path / "run", BEST, damaged.model)
    assert (damaged.model.weight.item(), verify(tmp_path / "run")) == (3, [])


def test_damage_in_the_copy_names_the_copy(damaged, tmp_path):
    url = f"file://{tmp_path}/copy"
    flip(tmp_path / "copy/checkpoints/snapshots/U3/model.pt")
    with pytest.raises(SnapshotError) as raised:
        load(url, BEST, damaged.model)
    assert f"python -m keepbest verify {url}" in str(raised.value)


def test_verify_and_repair_say_what_to_do(damaged, tmp_path):
    (tmp_path / "run/checkpoints" / EARLIER).unlink()
    found = CliRunner().invoke(app, ["verify", str(tmp_path / "run")]).output
    assert ("python -m keepbest repair" in found, "Damage stays. Load" in found) == (True, True)
    left = CliRunner().invoke(app, ["repair", str(tmp_path / "run")]).output
    assert ("python -m keepbest repair" in left, "Damage stays. Load" in left) == (False, True)


def load_shards(directory: Path) -> str:
    try:
        load(directory, BEST, nn.Linear(1, 1))
    except SnapshotError as error:
        return str(error)
    return ""


def test_every_rank_learns_what_to_do_of_shards(tmp_path):
    with Run(tmp_path, format="dcp").keeper as keeper:
        keeper.observe(1.0, epoch=1)
    torch.save({}, next(path for path in keeper.best_path.rglob("*.distcp")))
    messages = run_ranks(load_shards, 2, tmp_path)
    assert [f"python -m keepbest verify {tmp_path}" in message for message in messages] == [True, True]

"""A variable in a path that nothing has replaced is refused by every face, before anything is made."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from torch import nn
from typer.testing import CliRunner

from keepbest import BestKeeper, abandon, average, load, open_run
from keepbest.cli.app import app
from keepbest.errors import ConfigError
from keepbest.export import export
from keepbest.remote.storage import local_path
from tests.faces import FACES
from tests.kit import cli_runs, toys
from tests.kit.runs import Run

BEST = "best_model.loss"
WAYS = {
    **{name: (lambda given, make=FACES[name]: make(Path(given), {}), "directory") for name in FACES},
    "Trainer": (toys.make_trainer, "directory"),
    "resume": (lambda given: toys.make_trainer(Path("run"), resume=given), "resume"),
    "abandon": (abandon, "directory"),
    "load": (lambda given: load(given, BEST, nn.Linear(1, 1)), "run"),
    "open_run": (open_run, "run"),
    "export": (lambda given: export(given, BEST, Path("model.pt")), "run"),
    "average": (lambda given: average(given, Path("model.pt"), top=2), "run"),
    "remote": (lambda given: Run(Path("run"), remote=f"file:///{given}").keeper, "remote"),
}
del WAYS["command_line"]  # which makes the folder itself


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory, which stays so, and a variable that is set."""
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize(("given", "variable"), [("${SCRATCH}/a", "${SCRATCH}"), ("runs/x-$JOB.1", "$JOB")])
@pytest.mark.parametrize("way", WAYS)
def test_variable_is_refused_by_its_name(way, given, variable, here):
    use, setting = WAYS[way]
    with pytest.raises(ConfigError) as raised:
        use(given)
    assert f"{setting}: " in str(raised.value)
    assert f"has the variable {variable} in it" in str(raised.value)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("name", ["directory", "trainer.resume"])
def test_command_refuses_a_variable_of_its_config(name, here, tmp_path):
    content = cli_runs.describe_run(here / "run", epochs=1)
    *outer, last = name.split(".")
    (content[outer[0]] if outer else content)[last] = "${SCRATCH}/a"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    result = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml")])
    assert f"{name}: '${{SCRATCH}}/a' has the variable ${{SCRATCH}} in it" in " ".join(result.output.split())
    assert (result.exit_code != 0, list(here.iterdir())) == (True, [])


def test_command_refuses_a_variable_in_what_it_writes(here):
    with Run(here.parent / "run").keeper as keeper:
        keeper.observe(1.0, epoch=1)
    result = CliRunner().invoke(app, ["export", str(here.parent / "run"), BEST, "--to", "$SCRATCH/model.pt"])
    assert "$SCRATCH" in result.output
    assert (result.exit_code != 0, list(here.iterdir())) == (True, [])


def test_folder_with_the_name_of_a_variable_is_used(here):
    (here / "${SCRATCH}").mkdir()
    with BestKeeper(nn.Linear(1, 1), directory="${SCRATCH}/a", metric_key="loss") as keeper:
        keeper.observe(1.0, epoch=1)
    assert keeper.best_path == here / "${SCRATCH}/a/checkpoints/snapshots/E1"


@pytest.mark.parametrize("given", ["a/cost$5", "a/b$", "a/$(date)", "${a/b}", "a/{b}"])
def test_sign_of_a_variable_alone_is_none(given, here):
    assert local_path(given) == here / given

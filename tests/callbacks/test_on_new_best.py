"""Hooks on a new best in a config: built by their kind, called on rank 0 or on every rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from keepbest.errors import ConfigError
from tests.kit import cli_runs as runs
from tests.kit.runs import ledger


class Note:
    """Writes what it is called with to a file."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def __call__(self, outcome, path: Path) -> None:
        with self.file.open("a") as file:
            file.write(f"{path.name} {outcome.value!r}\n")


def config_with(tmp_path: Path, *hooks: dict) -> Path:
    content = runs.describe_run(tmp_path / "run", epochs=3)
    content["trainer"]["callbacks"] = [runs.evaluation(), runs.best(on_new_best=list(hooks))]
    return runs.write_config(tmp_path / "config.yaml", content)


def test_hooks_of_a_config_are_called_on_each_new_best(tmp_path):
    kind = f"{__name__}.Note"
    every_rank = {"kind": "keepbest.EveryRank", "hook": {"kind": kind, "file": str(tmp_path / "every-rank")}}
    config = config_with(tmp_path, {"kind": kind, "file": str(tmp_path / "rank-0")}, every_rank)
    runs.succeeded(runs.train_on_ranks(1, config))
    bests = [line for line in ledger(tmp_path / "run") if line.get("best")]
    assert len(bests) > 1
    expected = [f"{line['snapshot']} {line['value']!r}" for line in bests]
    assert (tmp_path / "rank-0").read_text().splitlines() == expected
    assert (tmp_path / "every-rank").read_text().splitlines() == expected


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ({"kind": f"{__name__}.Note"}, "missing 1 required positional argument: 'file'"),
        ({"kind": "builtins.dict"}, "on_new_best: builtins.dict was called, and gave {}; kind names what makes"),
        ({"file": "x"}, "on_new_best.0.kind"),
    ],
    ids=["argument", "no function", "no kind"],
)
def test_hook_that_cannot_be_built_is_refused_before_training(hook, message, tmp_path):
    for outcome in runs.train_on_ranks(1, config_with(tmp_path, hook)):
        assert isinstance(outcome.exception, ConfigError)
        assert message in str(outcome.exception)
    assert not (tmp_path / "run").exists()

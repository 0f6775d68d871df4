"""What is wrong with a run is said on every rank, before training, and leaves the disk as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from keepbest.errors import ConfigError, KeepBestError, MissingMetricError, RunExistsError
from tests.kit import cli_runs as runs


def content(directory: Path) -> dict[str, Any]:
    return runs.describe_run(directory, epochs=2, strategy="ddp")


def fails_on_every_rank(config: Path, expected: type[KeepBestError], *words: str, world_size: int = 2) -> None:
    outcomes = runs.train_on_ranks(world_size, config)
    for outcome in outcomes:
        assert type(outcome.exception) is expected, outcome.traceback or "it trained"
        for word in words:
            assert word in str(outcome.exception)
    assert len({str(outcome.exception) for outcome in outcomes}) == 1


def best_settings(**settings: Any) -> dict[str, Any]:
    return {"trainer": {"callbacks": [runs.evaluation(), runs.best(**settings)]}}


BAD = {
    "unknown model name": (best_settings(model_names=["encodr"]), ["'encodr'", "encoder, decoder"]),
    "duplicate id": (
        {"trainer": {"callbacks": [runs.evaluation(), runs.best(id="a"), runs.best(id="A")]}},
        ["callbacks[1]", "callbacks[2]", "id"],
    ),
    "unknown dataset of a callback": (
        {"trainer": {"callbacks": [runs.evaluation(dataset_key="vall")]}},
        ["'vall'", "train", "val"],
    ),
    "unknown dataset of a child": (
        best_settings(eval_callbacks=[runs.evaluation(dataset_key="test")]),
        ["'test'", "train", "val"],
    ),
    "unknown dataset to train on": ({"trainer": {"train_dataset": "trian"}}, ["'trian'", "train", "val"]),
    "negative tolerance": (best_settings(tolerances=[-1]), ["tolerances.0 must be ", "or equal to 0, found -1"]),
    "tolerance given twice": (best_settings(tolerances=[2, 2]), ["tolerances", "differ", "found [2, 2]"]),
    "two intervals": (best_settings(every_n_epochs=1), ["exactly one", "every_n_epochs=1", "every_n_updates=1"]),
    "unknown direction": (best_settings(metric_key="val/score"), ["val/score", "higher_is_better"]),
    "empty dataset": ({"data": {"val": {"kind": "tests.kit.toys.Waves", "length": 0}}}, ["'val'", "no samples"]),
    "fewer samples than ranks": (
        {"data": {"train": {"kind": "tests.kit.toys.Waves", "length": 1}}},
        ["'train'", "1 sample"],
    ),
    "batch that the ranks cannot share": ({"trainer": {"effective_batch_size": 25}}, ["25", "2 ranks"]),
    "model without such an argument": ({"model": {"hiden": 3}}, ["tests.kit.toys.AutoEncoder", "hiden"]),
    "learning rate below 0": ({"optimizer": {"lr": -1.0}}, ["torch.optim.SGD", "-1.0"]),
    "learning rate in quotes": (
        {"optimizer": {"lr": "0.1"}},
        ["cannot build torch.optim.SGD with lr='0.1', momentum="],
    ),
    "strategy for one rank": ({"trainer": {"strategy": "single"}}, ["single", "ddp"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_config_fails_on_every_rank_and_writes_nothing(case, tmp_path):
    changes, words = BAD[case]
    config = content(tmp_path / "run")
    for section, settings in changes.items():
        config[section] = {**config[section], **settings}
    path = runs.write_config(tmp_path / "config.yaml", config)
    before = runs.tree(tmp_path)
    fails_on_every_rank(path, ConfigError, *words)
    assert runs.tree(tmp_path) == before


def test_folder_that_holds_another_run_is_left_alone(tmp_path):
    path = runs.write_config(tmp_path / "config.yaml", content(tmp_path / "run"))
    runs.succeeded(runs.train_on_ranks(2, path))
    before = runs.tree(tmp_path)
    runs.write_config(path, {**content(tmp_path / "run"), "seed": 13})
    fails_on_every_rank(path, RunExistsError, "another directory")
    path.unlink()
    after = {name: data for name, data in runs.tree(tmp_path).items() if not name.endswith("/lock")}
    assert after == {
        name: data for name, data in before.items() if not name.endswith("/lock") and name != "config.yaml"
    }


def test_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "run").write_text("mine")
    path = runs.write_config(tmp_path / "config.yaml", content(tmp_path / "run" / "a"))
    before = runs.tree(tmp_path)
    fails_on_every_rank(path, ConfigError, "expected a directory", f"{tmp_path / 'run'} is a file")
    assert runs.tree(tmp_path) == before


def test_metric_that_nobody_logs(tmp_path):
    config = content(tmp_path / "run")
    config["trainer"]["callbacks"][1] = runs.best(metric_key="loss/val/totl")
    path = runs.write_config(tmp_path / "config.yaml", config)
    fails_on_every_rank(path, MissingMetricError, "loss/val/totl", "loss/val/total")
    kept = runs.tree(tmp_path / "run" / "checkpoints")
    assert not [name for name in kept if name.startswith(("snapshots/", "best_model"))]


def test_real_command_ends_with_one_message(tmp_path):
    path = runs.write_config(tmp_path / "config.yaml", content(tmp_path / "run"))
    ended = runs.real_keepbest("train", path, "trainer.stratgy=ddp", processes=2)
    assert ended.returncode == 1
    assert ended.stderr.count("trainer: there is no setting 'stratgy'; did you mean 'strategy'?") == 1
    assert "src/keepbest" not in ended.stderr, "only torchrun itself may show a traceback, its own"
    assert not (tmp_path / "run").exists()


def test_debug_leaves_the_error_to_python(tmp_path):
    plain = runs.keepbest("show", tmp_path)
    assert (plain.exit_code, plain.stdout) == (1, "")
    assert plain.stderr.startswith("error: ")
    assert "Traceback" not in plain.stderr
    assert isinstance(runs.keepbest("--debug", "show", tmp_path).exception, KeepBestError)


@pytest.mark.parametrize("package", ["typer", "rich", "yaml"])
def test_missing_extra_is_named(package):
    program = f"import sys; sys.modules[{package!r}] = None; from keepbest.__main__ import main; main()"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert ended.stderr == (
        f"the command line needs the package {package!r}; install it with: pip install 'keepbest[cli]'\n"
    )

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from keepbest.errors import ConfigError, SnapshotError
from keepbest.training.trainer import Trainer
from tests.kit import cli_runs as runs
from tests.kit.runs import Run, ledger
from tests.kit.toys import AutoEncoder


class HalfFrozen(AutoEncoder):
    def __init__(self) -> None:
        super().__init__()
        self.decoder.bias.requires_grad_(False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    content = runs.describe_run(folder / "run", epochs=3, strategy="ddp")
    child = runs.evaluation(dataset_key="train")
    content["trainer"]["callbacks"] = [
        runs.evaluation(),
        runs.best(tolerances=[0, 50], eval_callbacks=[child]),
        # Another keeper that shares the snapshots, and has a metric of its own.
        runs.best(metric_key="loss/val/error", id="mine"),
    ]
    runs.succeeded(runs.train_on_ranks(2, runs.write_config(folder / "config.yaml", content)))
    return folder / "run"


def printed_metrics(output: str) -> dict[str, float]:
    lines = [line.split(" ") for line in output.splitlines() if line.startswith(("loss/", "best="))]
    return {key: float(value) for key, value in lines}


def test_show_prints_every_ref(trained):
    table = runs.keepbest("show", trained)
    assert (table.exit_code, table.stderr) == (0, "")
    shown = json.loads(runs.keepbest("show", trained, "--json").stdout)
    refs = {entry["ref"]: entry for entry in shown}
    assert set(refs) == {path.name for path in (trained / "checkpoints").glob("best_model.*")}
    assert {entry["tolerance"]: entry["exceeded"] for entry in shown if entry["metric_key"] == runs.METRIC} == {
        None: None,
        0: refs[f"{runs.BEST}.tolerance=0"]["exceeded"],
        50: False,
    }
    assert {entry["higher_is_better"] for entry in shown} == {False}
    assert "lower" in table.stdout
    for ref, entry in refs.items():
        folder = trained / "checkpoints" / ref
        assert folder.resolve().name == entry["snapshot"]
        sizes = {path.name: path.stat().st_size for path in folder.glob("*.pt")}
        assert {name: file["bytes"] for name, file in entry["files"].items()} == sizes
        assert entry["bytes"] == sum(sizes.values())
        assert ref in table.stdout
        assert entry["digest"][:12] in table.stdout
    assert "not exceeded (provisional)" in table.stdout


def test_show_gives_each_keeper_its_own_metric(trained):
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    by_iteration = {f"E{r['epoch']}_U{r['update']}_S{r['sample']}": r for r in records if runs.METRIC in r}
    for checkpoint in runs.checkpoints(trained).values():
        assert checkpoint.value == by_iteration[checkpoint.iteration][checkpoint.metric_key]


def test_train_ends_with_the_table(tmp_path):
    config = runs.write_config(tmp_path / "c.yaml", runs.describe_run(tmp_path / "run", epochs=1, strategy="ddp"))
    first, second = runs.succeeded(runs.train_on_ranks(2, config))
    assert f"checkpoints of {tmp_path / 'run'}" in first.output.replace("\n", "")
    assert runs.BEST in first.output
    assert [line for line in second.output.splitlines() if not line.startswith("[Gloo]")] == []  # of torch 2.10


@pytest.mark.parametrize(
    ("world_size", "arguments"),
    [(1, []), (2, []), (2, ["trainer.strategy=fsdp1"]), (2, ["trainer.strategy=fsdp2"])],
)
@pytest.mark.parametrize("ref", [runs.BEST, f"{runs.BEST}.tolerance=50"])
def test_eval_finds_the_metric_of_the_checkpoint(world_size, arguments, ref, trained):
    before = runs.tree(trained)
    outcomes = runs.succeeded(runs.eval_on_ranks(world_size, trained, *arguments, ref=ref))
    metrics = printed_metrics(outcomes[0].output)
    saved = runs.checkpoints(trained)[ref].value
    assert metrics[runs.METRIC] == pytest.approx(saved, abs=1e-6, rel=0)
    assert "best=loss.val.total/loss/train/total" in metrics
    assert "note:" not in outcomes[0].output
    assert not any(printed_metrics(outcome.output) for outcome in outcomes[1:])
    assert runs.tree(trained) == before


def test_real_eval_command(trained):
    ended = runs.real_keepbest("eval", trained, "--ref", runs.BEST, processes=2)
    assert ended.returncode == 0, ended.stderr
    saved = runs.checkpoints(trained)[runs.BEST].value
    assert printed_metrics(ended.stdout)[runs.METRIC] == pytest.approx(saved, abs=1e-6, rel=0)
    assert ended.stdout.count(f"{runs.METRIC} ") == 2, "once as it was saved and once as it is, on one rank only"


def test_eval_needs_to_know_which_of_two_bests(trained):
    for outcome in runs.eval_on_ranks(2, trained):
        assert isinstance(outcome.exception, ConfigError)
        assert f"{runs.BEST}.tolerance=50" in str(outcome.exception)


def test_eval_of_an_unknown_ref_lists_those_that_exist(trained):
    for outcome in runs.eval_on_ranks(2, trained, ref="best_model.loss.val.totl"):
        assert isinstance(outcome.exception, SnapshotError)
        assert runs.BEST in str(outcome.exception)


def test_eval_of_a_run_without_a_config_says_what_to_give(tmp_path):
    with Run(tmp_path).keeper as keeper:
        keeper.observe(1.0, epoch=1)
    ended = runs.keepbest("eval", tmp_path)
    assert ended.exit_code == 1
    assert ended.stderr.startswith(f"error: {tmp_path / 'config.yaml'} is missing: ")
    assert "--config" in ended.stderr
    assert "keepbest.load" in ended.stderr


def test_eval_tells_what_was_not_saved(tmp_path):
    content = runs.describe_run(tmp_path / "run", epochs=1)
    content["trainer"]["callbacks"][1] = runs.best(model_names=["encoder"])
    runs.succeeded(runs.train_on_ranks(1, runs.write_config(tmp_path / "c.yaml", content)))
    [outcome] = runs.succeeded(runs.eval_on_ranks(1, tmp_path / "run"))
    assert "note: decoder was not saved" in outcome.output


def test_eval_speaks_of_what_it_loaded_if_that_goes_meanwhile(tmp_path, monkeypatch):
    content = runs.describe_run(tmp_path / "run", epochs=1)
    content["model"] = {"kind": "tests.cli.test_show_eval.HalfFrozen"}
    content["trainer"]["callbacks"][1] = runs.best(save_frozen_weights=False)
    runs.succeeded(runs.train_on_ranks(1, runs.write_config(tmp_path / "c.yaml", content)))
    evaluate = Trainer.eval

    def evaluate_and_remove(trainer, **settings):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "snapshots")
        return evaluate(trainer, **settings)

    monkeypatch.setattr(Trainer, "eval", evaluate_and_remove)  # as a run does that finds a better one meanwhile
    ended = runs.keepbest("eval", tmp_path / "run")
    assert ended.exit_code == 0, ended.output
    assert "note: a part of decoder (bias) was not saved" in ended.stdout


def test_eval_of_a_resume_checkpoint_speaks_of_no_metric(tmp_path):
    content = runs.describe_run(tmp_path / "run", epochs=1)
    content["trainer"]["callbacks"].append({"name": "CheckpointCallback", "every_n_updates": 1})
    runs.succeeded(runs.train_on_ranks(1, runs.write_config(tmp_path / "c.yaml", content)))
    assert "checkpoint" in {line["event"] for line in ledger(tmp_path / "run")}
    ended = runs.keepbest("eval", tmp_path / "run", "--ref", "resume.latest")
    assert (ended.exit_code, "None" in ended.stdout) == (0, False)
    assert "\nresume.latest of E1_U2_S48\n" in ended.stdout


def test_show_names_a_damaged_snapshot_and_shows_the_others(trained, tmp_path):
    content = runs.describe_run(tmp_path / "run", updates=24)
    runs.succeeded(runs.train_on_ranks(1, runs.write_config(tmp_path / "c.yaml", content)))
    manifest = tmp_path / "run" / "checkpoints" / runs.BEST / "snapshot.json"
    manifest.write_bytes(manifest.read_bytes() + b" ")
    checkpoints = runs.checkpoints(tmp_path / "run")
    assert "damaged" in checkpoints[runs.BEST].damage
    assert checkpoints[f"{runs.BEST}.tolerance=0"].damage is None

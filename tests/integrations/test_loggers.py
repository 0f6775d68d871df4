"""Each new best in Weights & Biases and in MLflow, read back by their own means after keepbest has removed it."""

from __future__ import annotations

import importlib
import struct
from pathlib import Path

import pytest
import torch

from keepbest.errors import ConfigError
from tests.kit.runs import Run, snapshots, update


def keep_two(directory: Path, hook) -> None:
    """Two new bests, and, after a resume from before the second, one that is worse than that."""
    run = Run(directory, on_new_best=hook)
    with run.keeper:
        run.observe(5.0, 3.0)
    again = Run(directory, on_new_best=hook)
    again.keeper.start(at=update(1))
    with again.keeper:
        again.observe(4.0, first=2)
    assert snapshots(directory) == {"U2", "U2.r1"}


def weight_in(file: Path) -> int:
    return int(torch.load(file, weights_only=True)["weight"])


@pytest.fixture
def wandb_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'keepbest[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for kind in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path / kind))
    import wandb

    with wandb.init(dir=tmp_path, project="keepbest") as run:
        yield run


def offline_records(path: Path) -> list:
    """What `wandb sync` would send: records in the framing of LevelDB's logs, in blocks of 32 KiB after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts, records = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(Record.FromString(parts))
            parts = b""
    return records


def test_wandb_has_a_version_of_each_best_and_the_alias_on_the_best(wandb_run, tmp_path):
    from keepbest.integrations.wandb import BestArtifact

    keep_two(tmp_path / "run", BestArtifact("best-loss"))
    best = dict(wandb_run.summary)
    wandb_run.finish()
    importlib.import_module("wandb").teardown()  # the end of the process that writes, which may come later
    [path] = tmp_path.rglob("*.wandb")
    versions = [each.artifact for each in offline_records(path) if each.HasField("artifact")]
    assert best == {"best-loss/value": 3.0, "best-loss/iteration": "U2"}
    assert [set(version.aliases) - {"latest"} for version in versions] == [{"U1", "best"}, {"U2", "best"}, {"U2"}]
    # By now the run folder has lost the first, and nothing else would bring its files to the server.
    staged = [each.local_path for version in versions for each in version.manifest.contents if each.path == "model.pt"]
    assert [weight_in(Path(file)) for file in staged] == [1, 2, 2]


@pytest.fixture
def mlflow_run(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install 'keepbest[mlflow]'")
    import mlflow

    mlflow.set_tracking_uri("sqlite:///mlflow.db")
    with mlflow.start_run() as run:
        yield run


# What MLflow asks of SQLAlchemy.
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")
def test_mlflow_has_a_version_of_each_best_and_the_alias_on_the_best(mlflow_run, tmp_path):
    import mlflow

    from keepbest.integrations.mlflow import BestArtifact

    keep_two(tmp_path / "run", BestArtifact("best-loss"))
    client = mlflow.MlflowClient()
    values = client.get_metric_history(mlflow_run.info.run_id, "best-loss")
    assert [(metric.step, metric.value) for metric in values] == [(1, 5.0), (2, 3.0), (2, 4.0)]
    versions = client.search_model_versions("name='best-loss'")
    assert sorted((int(each.version), each.tags["value"]) for each in versions) == [(1, "5.0"), (2, "3.0"), (3, "4.0")]
    assert client.get_model_version_by_alias("best-loss", "best").version in (2, "2")
    folders = [mlflow.artifacts.download_artifacts(each) for each in ("models:/best-loss@best", "models:/best-loss/1")]
    assert [weight_in(Path(folder) / "model.pt") for folder in folders] == [2, 1]
    with Run(tmp_path / "samples", on_new_best=BestArtifact("by-sample")).keeper as keeper:
        keeper.observe(1.0, sample=64)
    assert [metric.step for metric in client.get_metric_history(mlflow_run.info.run_id, "by-sample")] == [64]


@pytest.mark.parametrize(("logger", "remedy"), [("wandb", "wandb.init"), ("mlflow", "mlflow.start_run")])
def test_logger_without_a_run_says_how_to_start_one(logger, remedy, tmp_path):
    pytest.importorskip(logger, reason=f"{logger} is not installed: pip install 'keepbest[{logger}]'")
    hook = importlib.import_module(f"keepbest.integrations.{logger}").BestArtifact("best-loss")
    run = Run(tmp_path, on_new_best=hook)
    with pytest.raises(ConfigError, match=remedy):
        run.observe(5.0)
    run.keeper.abandon()


@pytest.mark.parametrize("name", ["loss/val", "a:b", "acc@1", ""])
@pytest.mark.parametrize("logger", ["wandb", "mlflow"])
def test_name_that_a_logger_does_not_take_is_refused_at_once(logger, name):
    pytest.importorskip(logger, reason=f"{logger} is not installed: pip install 'keepbest[{logger}]'")
    with pytest.raises(ConfigError, match=f"expected .* name of .*, found '{name}'"):
        importlib.import_module(f"keepbest.integrations.{logger}").BestArtifact(name)

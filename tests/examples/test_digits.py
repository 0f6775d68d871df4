"""The example, on real data: the same bests on any number of ranks and with any strategy."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from examples.digits.data import Digits
from keepbest.errors import ConfigError
from tests.kit import cli_runs as runs

CONFIGS = runs.ROOT / "examples" / "digits"
METRIC = "loss/val/classification"
BEST = "best_model.loss.val.classification"


def losses(directory: Path) -> list[float]:
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [record[METRIC] for record in records if METRIC in record]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("alone") / "run"
    arguments = ["trainer.strategy=single", f"directory={directory}"]
    runs.succeeded(runs.train_on_ranks(1, CONFIGS / "float64.yaml", *arguments))
    return directory


def assert_same_run(directory: Path, alone: Path) -> None:
    found, expected = runs.checkpoints(directory), runs.checkpoints(alone)
    assert found.keys() == expected.keys()
    for ref, checkpoint in expected.items():
        assert (found[ref].iteration, found[ref].exceeded) == (checkpoint.iteration, checkpoint.exceeded)
        assert found[ref].value == pytest.approx(checkpoint.value, abs=1e-6, rel=0)
        mine, theirs = runs.weights(directory, ref), runs.weights(alone, ref)
        assert mine.keys() == theirs.keys() != set()
        for name, value in theirs.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-6, atol=1e-6)


def test_the_curve_has_a_clear_winner(alone):
    curve = losses(alone)
    refs = runs.checkpoints(alone)
    assert len(refs) == 3
    assert len({checkpoint.iteration for checkpoint in refs.values()}) == 3
    # No two values are so close that the last bits could change who is better.
    assert min(high - low for low, high in pairwise(sorted(curve))) > 1e-6
    assert refs[BEST].value == min(curve)
    assert 0 < curve.index(min(curve)) < len(curve) - 1


@pytest.mark.parametrize(("strategy", "world_size"), [("ddp", 2), ("ddp", 4), ("fsdp1", 3), ("fsdp2", 4)])
def test_ranks_and_strategy_change_nothing(strategy, world_size, alone, tmp_path):
    arguments = [f"trainer.strategy={strategy}", f"directory={tmp_path}/run"]
    runs.succeeded(runs.train_on_ranks(world_size, CONFIGS / "float64.yaml", *arguments))
    assert_same_run(tmp_path / "run", alone)


def test_real_torchrun(alone, tmp_path):
    arguments = ["trainer.strategy=fsdp2", f"directory={tmp_path}/run"]
    ended = runs.real_keepbest("train", CONFIGS / "float64.yaml", *arguments, processes=2)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count(f"{BEST} ") == 1
    assert_same_run(tmp_path / "run", alone)


def test_demo_overfits_and_keeps_three_different_checkpoints(tmp_path):
    config = CONFIGS / "config.yaml"
    runs.succeeded(runs.train_on_ranks(2, config, f"directory={tmp_path}/run"))
    refs = runs.checkpoints(tmp_path / "run")
    assert set(refs) == {BEST, f"{BEST}.tolerance=1", f"{BEST}.tolerance=3"}
    assert [refs[f"{BEST}.tolerance={tolerance}"].exceeded for tolerance in (1, 3)] == [True, True]
    assert len({checkpoint.iteration for checkpoint in refs.values()}) == 3
    assert all(set(checkpoint.files) == {"encoder.pt", "classifier.pt"} for checkpoint in refs.values())
    curve = losses(tmp_path / "run")
    assert curve[-1] > 1.05 * min(curve)
    assert "best=loss.val.classification/loss/test/classification" in (tmp_path / "run/metrics.jsonl").read_text()

    [alone] = runs.succeeded(runs.eval_on_ranks(1, tmp_path / "run"))
    [line] = [line for line in alone.output.splitlines() if line.startswith(f"{METRIC} ")]
    assert float(line.split(" ")[1]) == pytest.approx(min(curve), abs=1e-6, rel=0)
    assert "note: decoder was not saved" in alone.output


@cache
def whole_split(split: str) -> Digits:
    return Digits(split)


def test_no_image_is_in_two_splits_and_none_is_lost():
    from sklearn.datasets import load_digits

    def as_rows(images: torch.Tensor, labels: torch.Tensor) -> list[tuple[float, ...]]:
        return sorted((*row, label) for row, label in zip(images.tolist(), labels.tolist(), strict=True))

    images, labels = load_digits(return_X_y=True)
    splits = [whole_split(split) for split in ("train", "val", "test")]
    assert [len(split) for split in splits] == [997, 400, 400]
    together = as_rows(torch.cat([split.images for split in splits]), torch.cat([split.labels for split in splits]))
    assert together == as_rows(torch.from_numpy(images) / 16, torch.from_numpy(labels))


def test_size_takes_the_first_of_a_split():
    part = Digits("train", 20)
    assert torch.equal(part.images, whole_split("train").images[:20])
    sample = part[3]
    assert (sample["image"].shape, sample["image"].dtype) == ((64,), torch.float32)
    assert sample["label"].dtype == torch.int64


@pytest.mark.parametrize(("split", "size"), [("vall", None), ("val", 401), ("val", 0)])
def test_split_that_is_not_there_is_refused(split, size):
    with pytest.raises(ConfigError, match="val"):
        Digits(split, size)

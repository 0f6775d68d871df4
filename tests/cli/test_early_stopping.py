"""What the library is for: one long run keeps what early stopping with each patience would have kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.kit import cli_runs as runs

UPDATES = 24
TOLERANCES = [0, 1, 3]


def losses(directory: Path) -> list[float]:
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [record[runs.METRIC] for record in records if runs.METRIC in record]


@pytest.mark.parametrize(("world_size", "strategy"), [(1, "single"), (2, "ddp"), (2, "fsdp2")])
def test_long_run_keeps_what_early_stopping_finds(world_size, strategy, tmp_path):
    content = runs.describe_run(tmp_path / "long", updates=UPDATES, strategy=strategy)
    content["model"]["dropout"] = 0.0
    path = runs.write_config(tmp_path / "config.yaml", content)
    runs.succeeded(runs.train_on_ranks(world_size, path))
    long, curve = runs.checkpoints(tmp_path / "long"), losses(tmp_path / "long")
    assert len(curve) == UPDATES

    for tolerance in TOLERANCES:
        content["directory"] = str(tmp_path / f"short{tolerance}")
        stopper = {
            "name": "MetricEarlyStopper",
            "metric_key": runs.METRIC,
            "tolerance": tolerance,
            "every_n_updates": 1,
        }
        content["trainer"]["callbacks"] = [runs.evaluation(), runs.best(), stopper]
        runs.succeeded(runs.train_on_ranks(world_size, runs.write_config(path, content)))
        stopped, short = losses(tmp_path / f"short{tolerance}"), runs.checkpoints(tmp_path / f"short{tolerance}")
        assert len(stopped) < UPDATES, "it must have stopped early for this to tell anything"
        assert stopped == curve[: len(stopped)]
        assert min(curve[len(stopped) :]) < min(stopped), "the metric must get better again after the stop"

        ref = f"{runs.BEST}.tolerance={tolerance}"
        assert long[ref].exceeded
        assert long[ref].value == short[runs.BEST].value == min(stopped)
        assert long[ref].iteration == short[runs.BEST].iteration
        found, expected = (
            runs.weights(tmp_path / "long", ref),
            runs.weights(tmp_path / f"short{tolerance}", runs.BEST),
        )
        assert found.keys() == expected.keys() != set()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert long[runs.BEST].value == min(curve)
    assert long[f"{runs.BEST}.tolerance=0"].value != long[f"{runs.BEST}.tolerance=3"].value != min(curve)

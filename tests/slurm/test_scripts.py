"""The launch scripts on a cluster: they train what one process would have trained."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from examples.digits.model import DigitsModel
from keepbest import load
from tests.kit import cli_runs as runs
from tests.slurm.scripts import edited

CONFIG = "examples/digits/float64.yaml"  # the same on any number of ranks, up to the last bits
BEST = "best_model.loss.val.classification"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("alone") / "run"
    ended = runs.real_keepbest("train", CONFIG, "trainer.strategy=single", f"directory={directory}")
    assert ended.returncode == 0, ended.stderr
    return directory


@pytest.mark.parametrize(
    ("script", "nodes", "strategy"),
    [
        ("slurm_single_node.sbatch", 1, "ddp"),
        ("slurm_multi_node.sbatch", 2, "fsdp2"),
        ("slurm_requeue.sbatch", 2, "ddp"),
    ],
)
def test_script_trains_what_one_process_does(script, nodes, strategy, cluster, alone, tmp_path):
    size = {"nodes": nodes, "ntasks_per_node": 4 // nodes, "gpus_per_node": None, "cpus_per_task": 1}
    script = edited(script, tmp_path, COMMAND=f"(-m keepbest train {CONFIG})", PYTHON=f"({sys.executable})", **size)
    directory = tmp_path / "run"
    job = cluster.submit(script, f"directory={directory}", f"trainer.strategy={strategy}", output=tmp_path / "job.out")
    assert job.wait() == "COMPLETED", job.printed()
    assert (job.exit_status, job.restarts) == (0, 0)

    found, expected = runs.checkpoints(directory), runs.checkpoints(alone)
    assert found.keys() == expected.keys()
    for ref, checkpoint in expected.items():
        assert (found[ref].iteration, found[ref].exceeded) == (checkpoint.iteration, checkpoint.exceeded)
        assert found[ref].value == pytest.approx(checkpoint.value, abs=1e-6, rel=0)
        [line] = [line for line in job.printed().splitlines() if line.strip().startswith(f"{ref} ")]
        assert f" {checkpoint.iteration} " in line
        assert f" {found[ref].value:.9g} " in line
    model, expected_model = (DigitsModel(hidden=64).double() for _ in range(2))
    assert load(directory, BEST, model).iteration == load(alone, BEST, expected_model).iteration
    for mine, theirs in zip(model.parameters(), expected_model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)

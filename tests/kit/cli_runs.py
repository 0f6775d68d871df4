"""Runs from the command line, small ones: a composite of four layers whose loss goes up and down."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from click.testing import Result
from typer.testing import CliRunner

from keepbest.cli.app import app
from keepbest.cli.work import evaluate, train
from keepbest.reading.checkpoint import Checkpoint
from keepbest.reading.run import open_run
from tests.kit.pool import Outcome, start_ranks

# The click of typer 0.15 mixes what a command prints with its errors, unless it is asked not to.
APART = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}
ROOT = Path(__file__).resolve().parents[2]
METRIC = "loss/val/total"
BEST = "best_model.loss.val.total"


def describe_run(directory: Path, **trainer: Any) -> dict[str, Any]:
    """The content of a config: two updates in an epoch, the metric at every update."""
    return {
        "directory": str(directory),
        "seed": 12,
        "model": {"kind": "tests.kit.toys.AutoEncoder", "dropout": 0.1},
        "data": {
            "train": {"kind": "tests.kit.toys.Waves"},
            "val": {"kind": "tests.kit.toys.Waves", "length": 17, "phase": 0.5},
        },
        # Learns too fast, so that the loss goes up again and again.
        "optimizer": {"kind": "torch.optim.SGD", "lr": 0.3, "momentum": 0.95},
        "trainer": {
            "effective_batch_size": 24,
            "callbacks": [evaluation(), best(tolerances=[0, 1, 3])],
            **trainer,
        },
    }


def evaluation(**settings: Any) -> dict[str, Any]:
    return {"name": "OfflineLossCallback", "dataset_key": "val", "every_n_updates": 1, **settings}


def best(**settings: Any) -> dict[str, Any]:
    return {"name": "BestCheckpointCallback", "metric_key": METRIC, "every_n_updates": 1, **settings}


def write_config(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def train_on_ranks(world_size: int, config: Path, *arguments: str) -> list[Outcome]:
    """How each rank's `train` ended."""
    with start_ranks(train, world_size, config, arguments) as ranks:
        return ranks.collect(timeout=100)


def eval_on_ranks(world_size: int, run: Path, *arguments: str, ref: str | None = None) -> list[Outcome]:
    """How each rank's `eval` ended."""
    with start_ranks(evaluate, world_size, run, ref, arguments) as ranks:
        return ranks.collect(timeout=100)


def succeeded(outcomes: list[Outcome]) -> list[Outcome]:
    assert not any(outcome.failed for outcome in outcomes), "\n".join(outcome.traceback for outcome in outcomes)
    return outcomes


def keepbest(*arguments: str | Path) -> Result:
    """How the command ends in this process, which has imported torch already."""
    return CliRunner(**APART).invoke(app, [str(argument) for argument in arguments])


def real_keepbest(*arguments: str | Path, processes: int | None = None) -> subprocess.CompletedProcess[str]:
    """How the command ends in a process of its own, or under torchrun if there are `processes`."""
    launcher = [sys.executable, "-m"]
    if processes is not None:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [*launcher, "keepbest", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ.copy(), capture_output=True, text=True, timeout=120, check=False
    )


def checkpoints(directory: Path) -> dict[str, Checkpoint]:
    return open_run(directory).refs


def weights(directory: Path, ref: str) -> dict[str, torch.Tensor]:
    """The tensors that a user finds under the link of that name, also those of optimizers."""
    found = {}
    for path in (directory / "checkpoints" / ref).glob("*.pt"):
        state = torch.load(path, weights_only=True)
        found.update({f"{path.stem}.{name}": value for name, value in state.items() if isinstance(value, torch.Tensor)})
    return found


def assert_same_run(directory: Path, whole: Path) -> None:
    """The same refs at the same iterations, with the same values and, bit for bit, the same weights."""
    found, expected = checkpoints(directory), checkpoints(whole)
    assert found.keys() == expected.keys() != set()
    for ref, theirs in expected.items():
        mine = found[ref]
        assert (mine.value, mine.iteration, mine.exceeded) == (theirs.value, theirs.iteration, theirs.exceeded)
        held, wanted = weights(directory, ref), weights(whole, ref)
        assert held.keys() == wanted.keys() != set()
        assert [name for name in wanted if not torch.equal(held[name], wanted[name])] == []


def tree(directory: Path) -> dict[str, bytes | None]:
    """Every path below `directory`, and what is in the files."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")
    }

"""Runs whose ranks come and go: resumed on others, and restarted by torchrun after one was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch

from keepbest.callbacks.base import CallbackBase
from keepbest.callbacks.config import CallBackBaseConfig
from keepbest.cli.work import train
from keepbest.errors import PreemptedError
from keepbest.run.verify import verify
from tests.kit import cli_runs as runs
from tests.kit.pool import start_ranks
from tests.training.test_preemption import with_signal

EPOCHS = 12  # of two updates
TOLERANCES = (0, 1, 3)


class DiesOnceConfig(CallBackBaseConfig):
    name: Literal["DiesOnce"] = "DiesOnce"
    update: int
    rank: int
    note: Path


class DiesOnce(CallbackBase):
    """Kills its own process after one update on one rank, unless it has done so before."""

    config_class: ClassVar[type[DiesOnceConfig]] = DiesOnceConfig

    def after_update(self, *, update_counter: Any, **_kwargs: Any) -> None:
        config = self.callback_config
        if (update_counter.update, self.ranks.rank) == (config.update, config.rank) and not config.note.exists():
            config.note.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def describe(directory: Path, strategy: str) -> dict[str, Any]:
    content = runs.describe_run(directory, epochs=EPOCHS, strategy=strategy, precision="float64")
    # Random numbers in training would differ with the number of ranks.
    content["model"]["dropout"] = 0.0
    content["trainer"]["callbacks"].append({"name": "CheckpointCallback", "every_n_epochs": 2})
    return content


def logged(directory: Path) -> list[float]:
    """The metric at every update of a run that was never interrupted."""
    records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [record[runs.METRIC] for record in records if runs.METRIC in record]


def table_by_hand(values: list[float]) -> dict[str, tuple[float, bool | None]]:
    """Ref -> value and whether the tolerance was exceeded, after these values."""
    best, droughts, exceeded = float("inf"), 0, {}
    for value in values:
        best, droughts = (value, 0) if value < best else (best, droughts + 1)
        for tolerance in TOLERANCES:
            if droughts > tolerance:
                exceeded.setdefault(tolerance, best)
    refs = {f"{runs.BEST}.tolerance={n}": (exceeded.get(n, best), n in exceeded) for n in TOLERANCES}
    return {runs.BEST: (best, None), **refs}


def assert_equal_up_to_rounding(found: Path, expected: Path) -> None:
    mine, theirs = runs.checkpoints(found), runs.checkpoints(expected)
    assert mine.keys() == theirs.keys()
    for ref, checkpoint in theirs.items():
        assert (mine[ref].iteration, mine[ref].exceeded) == (checkpoint.iteration, checkpoint.exceeded)
        assert mine[ref].value == pytest.approx(checkpoint.value, rel=1e-9)
        torch.testing.assert_close(runs.weights(found, ref), runs.weights(expected, ref), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(
    "parts",
    [
        [(4, "ddp"), (2, "ddp"), (3, "ddp")],
        [(2, "ddp"), (2, "fsdp2"), (1, "single")],
        [(4, "fsdp2"), (2, "fsdp1"), (3, "fsdp2")],
    ],
    ids=lambda parts: "-".join(f"{strategy}-{world_size}" for world_size, strategy in parts),
)
def test_run_resumed_on_other_ranks_ends_like_one_on_one_rank(parts, tmp_path):
    whole, elastic = tmp_path / "whole", tmp_path / "elastic"
    path = tmp_path / "config.yaml"
    runs.succeeded(runs.train_on_ranks(1, runs.write_config(path, describe(whole, "single"))))
    values = logged(whole)

    def go_on(world_size: int, strategy: str, until: int, *, stopped_by_signal: bool) -> None:
        content = describe(elastic, strategy)
        content["trainer"]["resume"] = "auto"
        if stopped_by_signal:
            # Sent during one update, it travels while the next one runs.
            content = with_signal(content, signal.SIGTERM, until - 1, world_size - 1)
        else:
            content["trainer"].update(epochs=until // 2)
        runs.write_config(path, content)
        with start_ranks(train, world_size, path, []) as ranks:
            outcomes = ranks.collect(timeout=100)
        if stopped_by_signal:
            assert [type(outcome.exception) for outcome in outcomes] == [PreemptedError] * world_size
        else:
            runs.succeeded(outcomes)
        found = {ref: (each.value, each.exceeded) for ref, each in runs.checkpoints(elastic).items()}
        # A tolerance that was not exceeded gets its ref when training ends, not when it is interrupted.
        expected = {
            ref: (pytest.approx(value, rel=1e-9), exceeded)
            for ref, (value, exceeded) in table_by_hand(values[:until]).items()
            if not (stopped_by_signal and exceeded is False)
        }
        assert found == expected
        assert verify(elastic) == []

    first, second, third = parts
    go_on(*first, 7, stopped_by_signal=True)
    go_on(*second, 16, stopped_by_signal=False)
    go_on(*third, 2 * EPOCHS, stopped_by_signal=False)
    assert_equal_up_to_rounding(elastic, whole)


def test_run_continues_after_torchrun_restarts_killed_workers(tmp_path):
    whole, restarted, note = tmp_path / "whole", tmp_path / "restarted", tmp_path / "died"
    path = tmp_path / "config.yaml"
    runs.succeeded(runs.train_on_ranks(2, runs.write_config(path, describe(whole, "ddp"))))

    content = describe(restarted, "ddp")
    content["trainer"]["resume"] = "auto"
    kill = {"kind": f"{__name__}.DiesOnce", "every_n_updates": 1, "update": 15, "rank": 0, "note": str(note)}
    content["trainer"]["callbacks"].insert(0, kill)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command = [*torchrun, "-m", "keepbest", "train", str(runs.write_config(path, content))]
    ended = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert note.exists()
    updates = [json.loads(line)["update"] for line in (restarted / "metrics.jsonl").read_text().splitlines()]
    assert [updates.count(update) for update in (12, 13)] == [1, 2], "it must have gone on after update 12"

    runs.assert_same_run(restarted, whole)
    assert verify(restarted) == []

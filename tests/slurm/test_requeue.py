"""Jobs that are interrupted, return to the queue, and end like one that was never interrupted."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from keepbest.run.reader import read_history
from keepbest.run.verify import verify
from tests.kit import cli_runs as runs
from tests.slurm.cluster import NODES, Cluster, Job
from tests.slurm.scripts import edited

PART = 50  # updates that are seen between two interruptions


def submit(
    cluster: Cluster,
    folder: Path,
    name: str,
    updates: int,
    *,
    seconds: float = 0.02,
    model: dict[str, Any] | None = None,
    **lines: Any,
) -> Job:
    """Four ranks on two nodes, and resume checkpoints that are due after the half and at the end."""
    callbacks = [
        runs.evaluation(),
        runs.best(tolerances=[0, 1, 3]),
        {"name": "CheckpointCallback", "every_n_updates": updates // 2},
        {"kind": "tests.slurm.pause.Pause", "every_n_updates": 1, "seconds": seconds},
    ]
    content = runs.describe_run(folder / name, updates=updates, strategy="ddp", callbacks=callbacks)
    content["model"] = {**content["model"], **(model or {})}
    config = runs.write_config(folder / f"{name}.yaml", content)
    size = {"nodes": 2, "ntasks_per_node": 2, "gpus_per_node": None, "cpus_per_task": 1}
    command = f"(-m keepbest train {config} trainer.resume=auto)"
    own = {"COMMAND": command, "PYTHON": f"({sys.executable})"}
    script = edited("slurm_requeue.sbatch", folder, **own, **{**size, **lines})
    return cluster.submit(script, output=folder / f"{name}.out")


def observed(directory: Path) -> int:
    """How many updates were evaluated, and those twice that were done twice."""
    ledger = directory / "checkpoints" / "ledger.jsonl"
    return ledger.read_text().count('"event":"observation"') if ledger.exists() else 0


def assert_same_run(directory: Path, whole: Path) -> None:
    assert verify(directory) == []
    runs.assert_same_run(directory, whole)
    assert len(runs.checkpoints(whole)) == 4
    # The weights of every update were the same, or a loss would differ.
    assert curve(directory) == curve(whole)


def curve(directory: Path) -> list[tuple[str, float]]:
    entries = read_history(directory).keepers[runs.BEST].present.entries
    return [(str(entry.observation.iteration), entry.observation.value) for entry in entries]


def preemptions(job: Job) -> list[int]:
    """After which updates the ranks of the job stopped, as they say."""
    return [int(found) for found in re.findall(r"asked to stop by a signal, and did at \w+_U(\d+)_", job.printed())]


def interrupt(job: Job, directory: Path, rounds: int, how: Callable[[], Any]) -> None:
    for number in range(1, rounds + 1):
        before = observed(directory)
        job.wait_until(
            f"is in the middle of part {number}",
            lambda before=before: job.state == "RUNNING" and observed(directory) > before + PART,
        )
        how()
        job.wait_until(f"returned to the queue {number} times", lambda number=number: job.restarts == number)


@pytest.fixture(scope="module")
def updates(rounds) -> int:
    return 3 * PART * rounds


@pytest.fixture(scope="module")
def whole(cluster, updates, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    job = submit(cluster, folder, "run", updates)
    assert job.wait() == "COMPLETED", job.printed()
    assert len(curve(folder / "run")) == updates
    return folder / "run"


def test_job_that_is_signalled_goes_on_from_where_it_was(cluster, rounds, updates, whole, tmp_path):
    job = submit(cluster, tmp_path, "run", updates)
    interrupt(job, tmp_path / "run", rounds, lambda: cluster.run("scancel", "--signal=USR1", str(job.number)))
    assert job.wait() == "COMPLETED", job.printed()
    assert (job.exit_status, job.restarts) == (0, rounds)
    stops = preemptions(job)
    assert len(stops) == rounds
    assert all(earlier < later for earlier, later in pairwise([0, *stops, updates]))
    # No update was done twice: each start went on from the update that the one before it had stopped at.
    assert observed(tmp_path / "run") == updates
    assert_same_run(tmp_path / "run", whole)


def test_job_signalled_before_training_returns_to_the_queue(cluster, updates, whole, tmp_path):
    late = {"kind": "tests.slurm.pause.LateAutoEncoder", "folder": str(tmp_path)}
    job = submit(cluster, tmp_path, "run", updates, model=late)
    job.wait_until("builds its model", lambda: len(list(tmp_path.glob("rank*"))) == 4)
    cluster.run("scancel", "--signal=USR1", str(job.number))
    job.wait_until("returned to the queue", lambda: job.restarts == 1)
    (tmp_path / "go").touch()
    assert job.wait() == "COMPLETED", job.printed()
    assert (job.exit_status, job.restarts, preemptions(job)) == (0, 1, [])
    assert_same_run(tmp_path / "run", whole)


def test_job_that_is_sent_back_to_the_queue_goes_on(cluster, rounds, updates, whole, tmp_path):
    job = submit(cluster, tmp_path, "run", updates)
    interrupt(job, tmp_path / "run", rounds, lambda: cluster.run("scontrol", "requeue", str(job.number)))
    assert job.wait() == "COMPLETED", job.printed()
    assert (job.exit_status, job.restarts) == (0, rounds)
    assert_same_run(tmp_path / "run", whole)


def test_job_returns_when_one_of_its_nodes_goes_down(cluster, rounds, updates, whole, tmp_path):
    if rounds == 1:
        pytest.skip("the same as above, except for what SLURM does; make soak has the time")
    down = ("scontrol", "update", f"NodeName={NODES[1]}", "State=DOWN", "Reason=test")
    job = submit(cluster, tmp_path, "run", updates)
    # The node is up again as soon as SLURM hears of it.
    interrupt(job, tmp_path / "run", rounds, lambda: cluster.run(*down))
    assert job.wait() == "COMPLETED", job.printed()
    assert (job.exit_status, job.restarts) == (0, rounds)
    assert_same_run(tmp_path / "run", whole)


def test_dead_rank_ends_the_job_which_resumes_from_a_checkpoint(cluster, updates, whole, tmp_path):
    job = submit(cluster, tmp_path, "run", updates)
    checkpoint = updates // 2
    job.wait_until("is behind its first resume checkpoint", lambda: observed(tmp_path / "run") > checkpoint + PART // 2)
    os.kill(job.processes()[3], signal.SIGKILL)
    assert job.wait() == "FAILED", job.printed()
    assert (job.exit_status, job.restarts) == (128 + signal.SIGKILL, 0)
    killed_at = observed(tmp_path / "run")

    cluster.run("scontrol", "requeue", str(job.number))
    job.wait_until("is back in the queue", lambda: job.restarts == 1)
    assert job.wait() == "COMPLETED", job.printed()
    assert observed(tmp_path / "run") == killed_at + updates - checkpoint
    assert_same_run(tmp_path / "run", whole)


def test_job_that_is_cancelled_does_not_return(cluster, updates, tmp_path):
    job = submit(cluster, tmp_path, "run", updates)
    job.wait_until("trains", lambda: observed(tmp_path / "run") > PART)
    cluster.run("scancel", str(job.number))
    assert job.wait() == "CANCELLED"
    assert job.restarts == 0


def test_job_that_needs_several_time_limits_gets_them(cluster, rounds, updates, whole, tmp_path):
    if rounds == 1:
        pytest.skip("SLURM keeps time limits to the minute; make soak has the time")
    # SLURM looks twice a minute, and signals rather too early than too late: after 60 to 90 seconds.
    job = submit(cluster, tmp_path, "run", updates, seconds=0.55, time=2, signal="USR1@30")
    assert job.wait(timeout=1700) == "COMPLETED", job.printed()
    assert job.restarts == len(preemptions(job)) >= rounds
    assert observed(tmp_path / "run") == updates
    assert_same_run(tmp_path / "run", whole)

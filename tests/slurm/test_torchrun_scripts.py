"""The launch scripts that need no scheduler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.kit import cli_runs as runs
from tests.kit.ports import held_ports
from tests.slurm.scripts import edited

COMMAND = "(-m keepbest train examples/digits/float64.yaml)"
BEST = "best_model.loss.val.classification"


def start(script: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([str(script), *arguments], cwd=runs.ROOT, env=environment, **pipes)


def end(*agents: subprocess.Popen[str]) -> str:
    """What they printed, once all of them have succeeded."""
    try:
        printed = "".join(agent.communicate(timeout=120)[0] for agent in agents)
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0] * len(agents), printed
    return printed


def test_one_machine_and_several_machines_train_the_same(tmp_path):
    script = edited("torchrun_single_node.sh", tmp_path, COMMAND=COMMAND, PROCESSES=4)
    assert end(start(script, f"directory={tmp_path}/one")).count(f"{BEST} ") == 1

    with held_ports(1) as [port]:
        size = {"NODES": 2, "PROCESSES": 2, "MEETING_POINT": f"localhost:{port}"}
        script = edited("torchrun_multi_node.sh", tmp_path, COMMAND=COMMAND, **size)
        agents = [start(script, f"directory={tmp_path}/several") for _ in range(2)]
        assert end(*agents).count(f"{BEST} ") == 1

    one, several = runs.checkpoints(tmp_path / "one"), runs.checkpoints(tmp_path / "several")
    assert {ref: (each.value, each.iteration) for ref, each in several.items()} == {
        ref: (each.value, each.iteration) for ref, each in one.items()
    }
    assert len(one) == 3

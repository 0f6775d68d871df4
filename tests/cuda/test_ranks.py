"""Two ranks of NCCL on one device keep the bits of the weights, in each way to shard them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda.rank_checks import GROUPS, NAMES, ON_CUDA, WORLD

ROOT = Path(__file__).parents[2]
_SECONDS = 150


class Ranks:
    """What both ranks reported of each check."""

    def __init__(self, folder: Path, group: str) -> None:
        self.folder = folder
        outputs = [(folder / f"rank{rank}.txt").open("wb") for rank in range(WORLD)]
        processes = [
            # The group is named above, the folder is pytest's.
            subprocess.Popen(
                [sys.executable, "-m", "tests.cuda.rank_checks", group, str(folder)],
                cwd=ROOT,
                env=_environment(rank),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            for rank, output in enumerate(outputs)
        ]
        try:
            for process in processes:
                process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            pass  # the checks that have no report fail, with the ends of the outputs
        finally:
            for process, output in zip(processes, outputs, strict=True):
                process.kill()
                process.wait()
                output.close()
        self._reports = [_read(folder / f"rank{rank}.jsonl") for rank in range(WORLD)]

    def errors(self, name: str) -> str:
        found = []
        for rank, report in enumerate(self._reports):
            if name not in report:
                output = (self.folder / f"rank{rank}.txt").read_text(errors="replace")
                found.append(f"rank {rank} did not finish it; the end of its output:\n{output[-1500:]}")
            elif report[name]["error"]:
                found.append(f"rank {rank}: {report[name]['error']}")
        return "\n".join(found)


def _read(path: Path) -> dict[str, dict[str, str]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {report["name"]: report for report in map(json.loads, lines)}


def _environment(rank: int) -> dict[str, str]:
    return os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(WORLD),
        "OMP_NUM_THREADS": "2",
        "GLOO_SOCKET_IFNAME": "lo",
        # NCCL refuses one device twice on one host. So each rank is a host, and they have only sockets.
        "NCCL_HOSTID": f"host{rank}",
        "NCCL_P2P_DISABLE": "1",
        "NCCL_SHM_DISABLE": "1",
        "NCCL_IB_DISABLE": "1",
        "NCCL_SOCKET_IFNAME": "lo",
        "PYTHONFAULTHANDLER": "1",
    }


@pytest.fixture(scope="module", params=list(GROUPS))
def ranks(request, tmp_path_factory):
    import torch

    if ON_CUDA and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return Ranks(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("name", NAMES)
def test_check_passes_on_both_ranks(ranks, name):
    errors = ranks.errors(name)
    assert not errors, errors

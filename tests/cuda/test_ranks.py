"""Two ranks of NCCL on one device keep the bits of the weights, in each way to shard them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.cuda.rank_checks import GROUPS, NAMES, ON_CUDA, WORLD

ROOT = Path(__file__).parents[2]
_SECONDS = 110  # for all checks of both groups


class Ranks:
    """What both ranks of a group report of each check.

    A check that fails may leave the ranks in different places, where keepbest runs no more collectives. One that ends a
    rank, or hangs, takes those after it with it. So these run in new processes.
    """

    def __init__(self, folder: Path, group: str, names: list[str]) -> None:
        self._folder, self._group, self._left = folder, group, names
        self._runs = 0
        self._reports: list[dict[str, str]] = [{} for _ in range(WORLD)]
        self.figures: list[tuple[str, str]] = []
        self._start()

    def _start(self) -> None:
        self._runs += 1
        folder = self._folder / f"run{self._runs}"
        folder.mkdir()
        (folder / "names").write_text("\n".join(self._left))
        self._files = [(folder / f"rank{rank}.txt", folder / f"rank{rank}.jsonl") for rank in range(WORLD)]
        self._processes = []
        for rank, (output, _) in enumerate(self._files):
            with output.open("wb") as file:
                # The group is named in rank_checks.py, the folder is pytest's.
                command = [sys.executable, "-m", "tests.cuda.rank_checks", self._group, str(folder)]
                process = subprocess.Popen(command, cwd=ROOT, env=_environment(rank), stdout=file, stderr=file)
            self._processes.append(process)

    def finish(self, deadline: float) -> None:
        """Waits for all checks, or until the deadline."""
        while True:
            while any(each.poll() is None for each in self._processes) and time.monotonic() < deadline:
                if any(each.poll() for each in self._processes):
                    time.sleep(1)  # the other rank may say why, too
                    break
                time.sleep(0.1)  # nothing reports that one of several processes has ended
            for each in self._processes:
                each.kill()
                each.wait()
            found = []
            for rank, (_, path) in enumerate(self._files):
                lines = _read(path)
                self.figures += [(line["name"], f"rank {rank}: {line['figures']}") for line in lines if line["figures"]]
                found.append({line["name"]: line["error"] for line in lines})
                self._reports[rank] |= found[-1]
            left = [name for name in self._left if any(name not in report for report in found)]
            if not left:
                return
            has_stopped = all(each.returncode == 0 for each in self._processes)  # after a check that failed
            for rank, (output, _) in enumerate([] if has_stopped else self._files):
                tail = output.read_text(errors="replace")[-2500:]
                self._reports[rank].setdefault(left[0], f"it did not finish; the end of the output:\n{tail}")
            self._left = left if has_stopped else left[1:]
            if time.monotonic() >= deadline or not self._left:
                return
            self._start()

    def errors(self, name: str) -> str:
        found = [(rank, report.get(name, "there was no time for it")) for rank, report in enumerate(self._reports)]
        return "\n".join(f"rank {rank}: {error}" for rank, error in found if error)


def _read(path: Path) -> list[dict[str, str]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return list(map(json.loads, lines))


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


@pytest.fixture(scope="module")
def groups(request, tmp_path_factory):
    if ON_CUDA and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    # Those alone that were selected. The groups run beside each other, since most of the time is that of their start.
    names = {group: [] for group in GROUPS}
    for item in request.session.items:
        parameters = getattr(item, "callspec", None) and item.callspec.params
        if item.path == Path(__file__) and parameters:
            names[parameters["group"]].append(parameters["name"])
    found = {group: Ranks(tmp_path_factory.mktemp(group), group, chosen) for group, chosen in names.items() if chosen}
    deadline = time.monotonic() + _SECONDS
    for each in found.values():
        each.finish(deadline)
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group", list(GROUPS))
def test_check_passes_on_both_ranks(groups, group, name, record_property):
    for check, figures in groups[group].figures:
        if check == name:
            record_property("figures", figures)
    errors = groups[group].errors(name)
    assert not errors, errors

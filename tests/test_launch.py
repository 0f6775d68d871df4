from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from keepbest.errors import ConfigError, RankTimeoutError
from keepbest.launch import Process, distributed, expand_node_list, read_environment
from tests.kit.launched import leave_for_torchrun
from tests.kit.pool import run_ranks
from tests.kit.ports import held_ports

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
}
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "SLURM_", "TORCHELASTIC_", "GROUP_")

SUM_OF_RANKS = """
import pathlib, sys, torch, torch.distributed as dist
from keepbest.launch import distributed
with distributed() as process:
    total = torch.tensor(process.rank)
    dist.all_reduce(total)
    report = f"rank {process.rank} of {process.world_size}: sum {total.item()}, {dist.get_backend()}"
    path = pathlib.Path(sys.argv[1], f"{process.rank}.txt")
path.write_text(f"{report}, initialised after: {dist.is_initialized()}")
"""

# Rank 0 is late at the second attempt, so that rank 1 finds in torchrun's store what the first one left there.
SECOND_ATTEMPT = """
import os, pathlib, sys, time, torch, torch.distributed as dist
from datetime import timedelta
from keepbest.launch import distributed
is_first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
if not is_first and os.environ["RANK"] == "0":
    time.sleep(1)  # is the late rank
with distributed(timeout=timedelta(seconds=20)) as process:
    total = torch.tensor(process.rank)
    dist.all_reduce(total)
    if is_first and process.rank == 1:
        os._exit(1)
    dist.barrier()
    report = f"rank {process.rank} of {process.world_size}: sum {total.item()}, {dist.get_backend()}"
    path = pathlib.Path(sys.argv[1], f"{process.rank}.txt")
path.write_text(f"{report}, initialised after: {dist.is_initialized()}")
"""

EXPECTED_REPORTS = [f"rank {rank} of 2: sum 1, gloo, initialised after: False" for rank in range(2)]


def reports(folder: Path) -> list[str]:
    return [(folder / f"{rank}.txt").read_text() for rank in range(2)]


def environment(**variables: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    return {**inherited, "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", **variables}


def test_torchrun_environment():
    assert read_environment(TORCHRUN) == Process(3, 4, 1, "host", 29500)


def test_torchrun_wins_over_slurm():
    assert read_environment({**SLURM, **TORCHRUN}).world_size == 4


@pytest.mark.parametrize("missing", sorted(TORCHRUN))
def test_missing_torchrun_variable_is_named(missing):
    variables = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(ConfigError, match=f"lacks {missing} "):
        read_environment(variables)


@pytest.mark.parametrize("missing", ["SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_NODELIST"])
def test_missing_slurm_variable_is_named(missing):
    variables = {name: value for name, value in SLURM.items() if name != missing}
    with pytest.raises(ConfigError, match=missing):
        read_environment(variables)


def test_slurm_environment():
    process = read_environment(SLURM)
    assert (process.rank, process.world_size, process.local_rank, process.master_addr) == (1, 2, 0, "gpu07")


def test_slurm_job_node_list_serves_where_the_step_has_none():
    variables = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}
    assert read_environment({**variables, "SLURM_JOB_NODELIST": "a,b"}).master_addr == "a"


def test_explicit_rendezvous_wins_under_slurm():
    process = read_environment({**SLURM, "MASTER_ADDR": "head", "MASTER_PORT": "4000"})
    assert (process.master_addr, process.master_port) == ("head", 4000)


@given(st.integers(1, 10**8), st.integers(1, 500), st.integers(0, 12), st.integers(0, 12))
def test_slurm_jobs_on_a_host_do_not_share_a_port(job, distance, step, other_step):
    def port(job_id: int, step_id: int) -> int:
        found = read_environment({**SLURM, "SLURM_JOB_ID": str(job_id), "SLURM_STEP_ID": str(step_id)}).master_port
        assert found is not None
        return found

    assert 1024 < port(job, step) < 32768
    assert port(job, step) == port(job, step)
    assert port(job, step) != port(job + distance, other_step)
    assert (port(job, step) == port(job, other_step)) == (step == other_step)


def test_value_that_is_no_number_is_named():
    with pytest.raises(ConfigError, match=r"WORLD_SIZE .*'four'"):
        read_environment({**TORCHRUN, "WORLD_SIZE": "four"})
    with pytest.raises(ConfigError, match="MASTER_PORT must be a port, up to 65535, found 65536"):
        read_environment({**TORCHRUN, "MASTER_PORT": "65536"})


def test_rank_outside_of_the_world():
    with pytest.raises(ConfigError, match=r"RANK=3 must be less than WORLD_SIZE=2"):
        read_environment({**TORCHRUN, "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", ["node1"]),
        ("a,b-c.d", ["a", "b-c.d"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-11,2]x,m[5]", ["n08x", "n09x", "n10x", "n11x", "n2x", "m5"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
    ],
)
def test_node_lists(text, hosts):
    assert expand_node_list(text) == hosts


@pytest.mark.parametrize("text", ["", "n[1-", "n[3-1]", "n[a]", "a,,b", "n]1[", "n[1,]", "a b"])
def test_what_is_no_node_list(text):
    with pytest.raises(ConfigError, match="not a SLURM node list"):
        expand_node_list(text)


def test_process_without_a_launcher_is_alone(monkeypatch):
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)
    with distributed() as process:
        assert process == Process()
        assert not dist.is_initialized()


def test_ranks_that_torchrun_starts_again_find_each_other(tmp_path: Path):
    script = tmp_path / "ranks.py"
    script.write_text(SECOND_ATTEMPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command = [*torchrun, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert reports(tmp_path) == EXPECTED_REPORTS


def test_under_slurm(tmp_path: Path):
    script = tmp_path / "ranks.py"
    script.write_text(SUM_OF_RANKS)
    job = {**SLURM, "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid())}
    tasks = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)],
            env=environment(**{**job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}),
        )
        for rank in range(2)
    ]
    try:
        assert [task.wait(timeout=120) for task in tasks] == [0, 0]
    finally:
        for task in tasks:
            task.kill()
    assert reports(tmp_path) == EXPECTED_REPORTS


def begin_late_on_rank_0(port, mark):
    """Whether rank 1 has begun its block while rank 0 still makes its connections."""
    init, rank, seen = dist.init_process_group, leave_for_torchrun(port), []

    def init_late(*arguments, **settings):
        init(*arguments, **settings)
        time.sleep(1.0 if rank == 0 else 0.0)  # is the late rank
        seen.append(mark.exists())

    dist.init_process_group = init_late
    with distributed():
        if rank == 1:
            mark.touch()
        dist.barrier()
    return seen


def test_no_rank_begins_before_all_are_connected(tmp_path):
    with held_ports(1) as [port]:
        assert run_ranks(begin_late_on_rank_0, 2, port, tmp_path / "begun") == [[False], [False]]


def devices(count, local_rank, monkeypatch):
    """The device that becomes current on a host that shows so many, and those that the process group is made for."""
    # There is no GPU here, and no torch that has NCCL.
    claimed, made = [], []
    for name, value in {**TORCHRUN, "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", claimed.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **given: made.append((backend, given["device_id"])))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with distributed():
        return claimed, made


@pytest.mark.parametrize(
    ("count", "local_rank", "index"),
    [(4, "1", 1), (1, "3", 0)],  # all devices are visible; one for each task, which may be a slice of one, as with MIG
)
def test_each_rank_claims_the_device_that_it_can_see(count, local_rank, index, monkeypatch):
    assert devices(count, local_rank, monkeypatch) == ([index], [("nccl", torch.device("cuda", index))])


def test_rank_without_a_device_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="local rank 2, but this host shows 2 CUDA devices"):
        devices(2, "2", monkeypatch)


def set_environment(monkeypatch, variables):
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_process_that_no_other_meets_says_how_to_start(rank, monkeypatch):
    with held_ports(1) as [port]:
        here = {"SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": str(port)}
        set_environment(monkeypatch, {**SLURM, **here, "SLURM_PROCID": rank})
        said = f"^rank {rank} of 2 did not meet the others at localhost, port {port}: .*[Tt]imed out .*srun has started"
        with pytest.raises(RankTimeoutError, match=said), distributed(timeout=timedelta(seconds=1)):
            pass
    assert not dist.is_initialized()


def test_group_is_destroyed_after_an_error(monkeypatch):
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    set_environment(monkeypatch, variables)

    def train() -> None:
        with distributed():
            assert dist.is_initialized()
            raise RuntimeError("in training")

    with pytest.raises(RuntimeError, match="in training"):
        train()
    assert not dist.is_initialized()

"""The default process group of a process that torchrun or SLURM started.

    with distributed() as process:
        ...                                # torch.distributed is initialised, or this is the only process

torchrun's variables come first: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. Without them, the variables of
`srun` count: SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID, SLURM_JOB_ID and SLURM_STEP_NODELIST. The address is then the
first node and the port is derived from the job, unless MASTER_ADDR or MASTER_PORT is set. Without variables of either
kind, the process is alone.
"""

from __future__ import annotations

import gc
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import (  # type: ignore[attr-defined]  # not in its __all__
    DistNetworkError,
    DistStoreError,
    PrefixStore,
    Store,
    TCPStore,
)

from keepbest.errors import ConfigError, RankTimeoutError

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_FIRST_PORT = 16384  # SLURM jobs get a port in [16384, 32768): not reserved, and below Linux' ephemeral ones
_PORTS = 16384
_LAST_PORT = 65535


@dataclass(frozen=True, slots=True)
class Process:
    """The place of this process in a launch.

    Attributes:
        rank: Rank among all processes, from 0.
        world_size: Number of processes.
        local_rank: Rank among the processes of this host, from 0.
        master_addr: Host of rank 0; `None` for a process that was launched alone.
        master_port: Port of rank 0; `None` for a process that was launched alone.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    master_addr: str | None = None
    master_port: int | None = None


@contextmanager
def distributed(*, timeout: timedelta = timedelta(minutes=10)) -> Iterator[Process]:
    """Initialise the default process group that the environment describes, and destroy it at the end. **Collective**.

    The backend is NCCL where CUDA is available, and the device of the local rank becomes current. On CPUs it is gloo.
    Nothing is initialised if the process was launched alone.

    Args:
        timeout: Timeout of the rendezvous and of every collective in the default group.

    Yields:
        The place of this process.

    Raises:
        ConfigError: If variables are missing or not numbers (it names them), or the host has no device for the local
            rank.
        RankTimeoutError: If not all processes have met in time, or they cannot meet where they shall.
    """
    process = read_environment(os.environ)
    if process.master_addr is None or process.master_port is None:
        yield process
        return
    device = _claim_device(process)
    with _naming_the_meeting(process):
        dist.init_process_group(
            "gloo" if device is None else "nccl",
            **_rendezvous(process, process.master_addr, process.master_port, timeout),
            rank=process.rank,
            world_size=process.world_size,
            timeout=timeout,
            device_id=device,
        )
    try:
        if device is None:
            # gloo returns as soon as the connections of this rank are there. If it failed at once, it would close them
            # while another rank still makes its own, and that one would show an error of gloo in place of the cause.
            dist.barrier()
        yield process
    finally:
        # FSDP models keep their groups in reference cycles. Groups that survive until the interpreter exits sometimes
        # end it with "terminate called without an active exception" from gloo's threads.
        gc.collect()
        dist.destroy_process_group()


@contextmanager
def _naming_the_meeting(process: Process) -> Iterator[None]:
    try:
        yield
    except (DistNetworkError, DistStoreError) as error:
        cause = str(error).partition("\n")[0]
        raise RankTimeoutError(
            f"rank {process.rank} of {process.world_size} did not meet the others at {process.master_addr}, port "
            f"{process.master_port}: {cause.rstrip('.')}. Check that the port is free there, and that torchrun or srun "
            "has started all of them. In a batch script of SLURM, a command without srun is one process"
        ) from error


def read_environment(environment: Mapping[str, str]) -> Process:
    """Return the place of this process according to `environment`. **Rank-local**.

    Raises:
        ConfigError: If variables of the launcher are missing or have invalid values.
    """
    if any(name in environment for name in _TORCHRUN):
        _require(environment, (*_TORCHRUN, "MASTER_ADDR", "MASTER_PORT"), launcher="torchrun")
        return _process(environment, rank="RANK", world_size="WORLD_SIZE", local_rank="LOCAL_RANK")
    if "SLURM_PROCID" in environment:
        defaults = _slurm_rendezvous(environment)
        _require(environment, ("SLURM_NTASKS", "SLURM_LOCALID"), launcher="SLURM")
        return _process(
            {**defaults, **environment}, rank="SLURM_PROCID", world_size="SLURM_NTASKS", local_rank="SLURM_LOCALID"
        )
    return Process()


def expand_node_list(text: str) -> list[str]:
    """Return the hosts of a SLURM node list: `a[1-2,07],b` is `a1`, `a2`, `a07`, `b`. **Rank-local**.

    Raises:
        ConfigError: If `text` is not such a list.
    """
    item = r"(?:[^\[\],\s]|\[[^\[\]\s]*\])+"
    if not re.fullmatch(rf"{item}(?:,{item})*", text):
        raise ConfigError(f"not a SLURM node list: {text!r}; expected a form like node[01-04,07],login1")
    hosts = []
    for host in re.findall(item, text):
        # Split at brackets: even parts are literal, odd ones were inside a pair.
        parts = re.split(r"\[(.*?)\]", host)
        choices = [_expand_ranges(part, text) if i % 2 else [part] for i, part in enumerate(parts)]
        hosts += ["".join(choice) for choice in product(*choices)]
    return hosts


def _expand_ranges(ranges: str, text: str) -> list[str]:
    numbers = []
    for part in ranges.split(","):
        bounds = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if bounds is None or int(bounds[2] or bounds[1]) < int(bounds[1]):
            raise ConfigError(f"not a SLURM node list: {text!r}; {part!r} is neither a number nor a range like 01-04")
        first, last = bounds[1], bounds[2] or bounds[1]
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def _slurm_rendezvous(environment: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    if "MASTER_ADDR" not in environment:
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
        if not nodes:
            raise ConfigError(
                "started by SLURM, but neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST is set; "
                "start the processes with srun, or set MASTER_ADDR to the host of rank 0"
            )
        found["MASTER_ADDR"] = expand_node_list(nodes)[0]
    if "MASTER_PORT" not in environment:
        _require(environment, ("SLURM_JOB_ID",), launcher="SLURM")
        # 13 is coprime to the number of ports: neighbouring jobs, and the first steps of each, differ.
        step = environment.get("SLURM_STEP_ID", "0")
        offset = _number(environment, "SLURM_JOB_ID") * 13 + (int(step) if step.isdecimal() else 0)
        found["MASTER_PORT"] = str(_FIRST_PORT + offset % _PORTS)
    return found


def _process(environment: Mapping[str, str], *, rank: str, world_size: str, local_rank: str) -> Process:
    process = Process(
        rank=_number(environment, rank),
        world_size=_number(environment, world_size),
        local_rank=_number(environment, local_rank),
        master_addr=environment["MASTER_ADDR"],
        master_port=_number(environment, "MASTER_PORT"),
    )
    if process.rank >= process.world_size:
        raise ConfigError(f"{rank}={process.rank} must be less than {world_size}={process.world_size}")
    if (port := int(environment["MASTER_PORT"])) > _LAST_PORT:
        raise ConfigError(f"the environment variable MASTER_PORT must be a port, up to {_LAST_PORT}, found {port}")
    return process


def _require(environment: Mapping[str, str], names: tuple[str, ...], *, launcher: str) -> None:
    missing = [name for name in names if not environment.get(name)]
    if missing:
        present = [name for name in names if name not in missing]
        raise ConfigError(
            f"the environment looks like that of {launcher} but lacks {', '.join(missing)} "
            f"(set: {', '.join(present) or 'none of them'}); start the processes with torchrun or srun, "
            "or unset these variables to run a single process"
        )


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if not text.isdecimal():
        raise ConfigError(f"the environment variable {name} must be an integer >= 0, found {text!r}")
    return int(text)


def _rendezvous(process: Process, address: str, port: int, timeout: timedelta) -> dict[str, Any]:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {"init_method": f"tcp://{_bracketed(address)}:{port}"}
    # torchrun keeps one store for all attempts. A restarted process would find the addresses of processes that ended.
    store = TCPStore(address, port, is_master=False, timeout=timeout)
    return {"store": PrefixStore(_agree_on_attempt(store, process, timeout), store)}


def _agree_on_attempt(store: Store, process: Process, timeout: timedelta) -> str:
    """Agree on a word that these processes share, and none before them had. **Collective**.

    Everything in the store may be from processes that have ended. So every rank asks with a word of its own, and rank 0
    answers every question, until each rank has confirmed the word that only this rank 0 can have sent.

    Raises:
        RankTimeoutError: On rank 0, if a rank does not start in time.
        RuntimeError: From torch, on the others, if rank 0 does not start in time.
    """
    word = uuid.uuid4().hex
    if process.rank > 0:
        store.set(f"keepbest/question/{process.rank}", word)
        attempt: str = store.get(f"keepbest/answer/{word}").decode()
        store.set(f"keepbest/{attempt}/{process.rank}", "")
        return attempt
    deadline = time.monotonic() + timeout.total_seconds()
    waiting = set(range(1, process.world_size))
    while waiting:
        if time.monotonic() > deadline:
            raise RankTimeoutError(
                f"rank 0 of {process.world_size} waited {timeout.total_seconds():g} s for ranks "
                f"{', '.join(map(str, sorted(waiting)))} to start; check whether they have ended with an error"
            )
        for rank in waiting:
            question = f"keepbest/question/{rank}"
            if store.check([question]):
                store.set(f"keepbest/answer/{store.get(question).decode()}", word)
        waiting = {rank for rank in waiting if not store.check([f"keepbest/{word}/{rank}"])}
        time.sleep(0.01)  # the store cannot wait for any of several keys
    return word


def _claim_device(process: Process) -> torch.device | None:
    if not torch.cuda.is_available():
        return None
    count = torch.cuda.device_count()
    # With one visible device per task (srun --gpus-per-task=1) every local rank has its own as number 0.
    index = 0 if count == 1 else process.local_rank
    if index >= count:
        raise ConfigError(
            f"rank {process.rank} has local rank {process.local_rank}, but this host shows {count} CUDA devices; "
            "start at most one process for each device"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address

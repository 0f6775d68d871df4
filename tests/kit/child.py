"""What runs inside a rank process: `announce` and `pause` are for the functions that tests hand to `run_ranks`."""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_to_parent: list[Connection] = []


def announce(text: str) -> None:
    """Informs the test, which waits with `RankProcesses.wait_for(rank, text)`, how far this rank is."""
    _to_parent[0].send_bytes(pickle.dumps(("event", text)))


def pause(text: str) -> None:
    """Announces `text`, then blocks until the test calls `RankProcesses.resume(rank)`."""
    announce(text)
    _to_parent[0].recv_bytes()


def in_forked_child(work: Callable[[], object]) -> int:
    """Exit status of a forked child that does `work` and nothing else of the test: 0 unless it raises."""
    if (child := os.fork()) == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def main(connection: Connection, folder: Path, rank: int, world_size: int, init: bool, job: bytes) -> None:
    """Runs the pickled `(function, arguments)`, reports its outcome and lives on until the parent lets go."""
    gc.freeze()  # what the forkserver has imported is no garbage, and stays shared with it
    threading.Thread(target=_end_with_test_process, daemon=True).start()
    _send_output_to(folder / f"rank{rank}.txt")
    _to_parent.append(connection)
    torch.set_num_threads(1)
    try:
        if init:
            _init_process_group(folder / "rendezvous", rank, world_size)
        function, arguments = pickle.loads(job)
        outcome = ("result", function(*arguments))
    except BaseException as error:  # noqa: BLE001 - SystemExit and KeyboardInterrupt are outcomes of a rank too
        outcome = ("exception", _transportable(error), traceback.format_exc())
    sys.stdout.flush()
    connection.send_bytes(_pickled(outcome))
    if outcome[0] == "result":
        # A rank that leaves early would break the connections of those that still communicate.
        connection.recv_bytes()
    if dist.is_initialized():
        dist.destroy_process_group()


def _end_with_test_process() -> None:
    """A test process that is killed by its own time limit leaves no ranks behind."""
    parent_process().join()
    os.kill(os.getpid(), signal.SIGKILL)


def _init_process_group(rendezvous: Path, rank: int, world_size: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(str(rendezvous), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    dist.barrier()  # a rank that destroyed its group at once would break the connections that others still make


def _send_output_to(path: Path) -> None:
    """Sends what this process prints, and its stacks on SIGUSR2 or a crash, to the file at `path`."""
    with path.open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)


def _transportable(error: BaseException) -> BaseException | None:
    """The error itself where it survives pickling, otherwise None (its traceback is sent as text anyway)."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - an exception class may raise anything, and then it cannot be sent
        return None
    return error


def _pickled(outcome: tuple[Any, ...]) -> bytes:
    try:
        return pickle.dumps(outcome)
    except Exception as error:  # noqa: BLE001 - reported to the test instead
        return pickle.dumps(("exception", None, f"the result of the rank cannot be pickled: {error!r}"))

"""Runs a function on real rank processes, at the price of a fork instead of an import of torch.

    results = run_ranks(function, 3, tmp_path)           # results[rank]; an exception of a rank is raised here

    with start_ranks(function, 3, tmp_path) as ranks:    # to kill, stop or observe single ranks
        ranks.wait_for(1, "saved", timeout=10)           # the function called child.announce("saved")
        ranks.signal(1, signal.SIGKILL)
        outcomes = ranks.collect(timeout=30)             # outcomes[rank].result | .exception | .exit_code

`function` must be importable by its module's name. Its arguments and result are pickled. The ranks have a gloo process
group over a FileStore, one thread, and no torchrun environment; with `init=False` there is no process group at all.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from multiprocessing import context, get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.kit import child

# torch imports the last ones on first use of an optimizer or of torch.compile, which would cost each rank a second.
_PRELOADED = [
    "torch",
    "torch.distributed",
    "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch._dynamo",
    "torch._dynamo.backends.debugging",
    "pytest",
    "keepbest",
    "keepbest.training.trainer",
    "keepbest.cli.work",
    "sklearn.datasets",
]
_forkserver = get_context("forkserver")
_forkserver.set_forkserver_preload(_PRELOADED)


def preload(*modules: str) -> None:
    """Lets ranks have further modules without importing them; to be called before the first ranks start."""
    _PRELOADED.extend(modules)
    _forkserver.set_forkserver_preload(_PRELOADED)


class RanksHungError(Exception):
    """Ranks that did not finish in time; the message has their stacks."""


class RankDiedError(Exception):
    """A rank process ended without an outcome, or with an exception that cannot be pickled."""


class RankTraceback(Exception):  # noqa: N818 - the cause of an error, never raised itself
    """Where the ranks failed, in their own words."""


@dataclass(frozen=True)
class Outcome:
    """How one rank ended. `exit_code` is negative for a signal, and None while the process lives."""

    rank: int
    result: Any = None
    exception: BaseException | None = None
    traceback: str = ""
    exit_code: int | None = None
    output: str = ""
    order: int = 0

    @property
    def failed(self) -> bool:
        return self.traceback != ""


def run_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 60.0, init: bool = True
) -> list[Any]:
    """Each rank's result of `function(*arguments)`, in order of rank.

    Raises:
        RanksHungError: if not all ranks finish within `timeout` seconds; all are killed.
        RankDiedError: if a rank process died before it could report.
        BaseException: what the first rank to fail raised, with the traceback of every failed rank as its cause.
    """
    with start_ranks(function, world_size, *arguments, init=init) as ranks:
        outcomes = ranks.collect(timeout)
    for outcome in outcomes:
        sys.stdout.write(outcome.output)
    failures = sorted((outcome for outcome in outcomes if outcome.failed), key=lambda outcome: outcome.order)
    if failures:
        text = "\n".join(f"rank {failure.rank} of {world_size}: {failure.traceback}" for failure in failures)
        raise failures[0].exception or RankDiedError(text) from RankTraceback(f"\n{text}")
    return [outcome.result for outcome in outcomes]


def start_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, init: bool = True) -> RankProcesses:
    """Starts the ranks and returns their handles, to be used in a `with` block; what still lives then is killed."""
    return RankProcesses(pickle.dumps((function, arguments)), world_size, init=init)


class RankProcesses:
    """Handles of running rank processes."""

    def __init__(self, job: bytes, world_size: int, *, init: bool) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self._connections: list[Connection] = []
        self._events: list[list[str]] = [[] for _ in range(world_size)]
        self._outcomes: dict[int, Outcome] = {}
        self.processes: list[context.ForkServerProcess] = []
        for rank in range(world_size):
            ours, theirs = _forkserver.Pipe()
            process = _forkserver.Process(
                target=child.main, args=(theirs, self._folder, rank, world_size, init, job), name=f"rank {rank}"
            )
            process.start()
            theirs.close()
            self._connections.append(ours)
            self.processes.append(process)

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        shutil.rmtree(self._folder)

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Sends a signal to one rank, for example SIGKILL, SIGSTOP or SIGCONT."""
        os.kill(self.processes[rank].pid, number)

    def resume(self, rank: int) -> None:
        """Lets a rank continue that waits in `child.pause`."""
        self._connections[rank].send_bytes(b"")

    def wait_for(self, rank: int, text: str, timeout: float = 30.0) -> None:
        """Returns once `rank` has announced `text`.

        Raises:
            RanksHungError: if it does not within `timeout` seconds.
            RankDiedError: if it ended without announcing it.
        """
        deadline = time.monotonic() + timeout
        while text not in self._events[rank]:
            if rank in self._outcomes:
                raise RankDiedError(f"rank {rank} ended before it announced {text!r}: {self._outcomes[rank]}")
            self._receive([rank], deadline, f"announce {text!r}")

    def collect(self, timeout: float = 60.0, ranks: Iterable[int] | None = None) -> list[Outcome]:
        """The outcomes of `ranks` (default: all), in the order given. When all have ended, their processes have too.

        Raises:
            RanksHungError: if one of them does not end within `timeout` seconds.
        """
        wanted = list(range(len(self.processes)) if ranks is None else ranks)
        deadline = time.monotonic() + timeout
        while waiting := [rank for rank in wanted if rank not in self._outcomes]:
            self._receive(waiting, deadline, "finish")
        if len(self._outcomes) == len(self.processes):
            self._let_go(deadline)
        return [self._final(self._outcomes[rank]) for rank in wanted]

    def _receive(self, ranks: list[int], deadline: float, step: str) -> None:
        """Takes the next message of each of `ranks` that has one; blocks until at least one has."""
        remaining = deadline - time.monotonic()
        ready = wait([self._connections[rank] for rank in ranks], max(remaining, 0.0))
        if not ready:
            raise RanksHungError(self._describe_hung(ranks, step))
        for rank in [rank for rank in ranks if self._connections[rank] in ready]:
            try:
                kind, *content = pickle.loads(self._connections[rank].recv_bytes())
            except (EOFError, ConnectionResetError):
                self.processes[rank].join()
                text = f"the process ended without an outcome, {_exit_text(self.processes[rank].exitcode)}"
                kind, content = "exception", [None, f"{text}\n{self._output(rank)}"]
            if kind == "event":
                self._events[rank] += content
            elif kind == "result":
                self._outcomes[rank] = Outcome(rank, result=content[0], order=len(self._outcomes))
            else:
                self._outcomes[rank] = Outcome(
                    rank, exception=content[0], traceback=content[1], order=len(self._outcomes)
                )

    def _let_go(self, deadline: float) -> None:
        """Lets the ranks that have a result destroy their process group and exit."""
        for rank, outcome in self._outcomes.items():
            if not outcome.failed and self.processes[rank].exitcode is None:
                self.resume(rank)
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 1.0))
        if hung := [rank for rank, process in enumerate(self.processes) if process.exitcode is None]:
            raise RanksHungError(self._describe_hung(hung, "leave its process group"))

    def _final(self, outcome: Outcome) -> Outcome:
        rank = outcome.rank
        return replace(outcome, exit_code=self.processes[rank].exitcode, output=self._output(rank))

    def _output(self, rank: int) -> str:
        path = self._folder / f"rank{rank}.txt"
        return path.read_text(errors="replace") if path.exists() else ""

    def _describe_hung(self, ranks: list[int], step: str) -> str:
        printed = {rank: len(self._output(rank)) for rank in ranks}
        for rank in ranks:
            self.signal(rank, signal.SIGUSR2)
        lines = [f"rank {', '.join(map(str, ranks))} of {len(self.processes)} did not {step} in time"]
        for rank in ranks:
            lines += [f"--- rank {rank}:", self._output_with_stacks(rank, printed[rank])]
        return "\n".join(lines)

    def _output_with_stacks(self, rank: int, length_before: int) -> str:
        """The output of a rank once it has dumped its stacks; a stopped process never does."""
        deadline = time.monotonic() + 2.0
        length, output = length_before, self._output(rank)
        while time.monotonic() < deadline and (len(output) == length_before or len(output) != length):
            time.sleep(0.02)  # nothing reports that a process has dumped its stacks
            length, output = len(output), self._output(rank)
        return output if len(output) > length_before else f"{output}(no stacks: the process is stopped or dead)"


def _exit_text(code: int | None) -> str:
    return f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"

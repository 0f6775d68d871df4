"""One rank raises, stops or dies at each step of the path: the others raise in time, name it, and hang nowhere."""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from keepbest import BestKeeper, MetricPropertyProvider, TrainingIteration
from keepbest.capture.transfer import ShardTransfer
from keepbest.errors import KeepBestError, PoisonedError, RankFailedError, RankTimeoutError
from tests.kit.files import Operation, SteppedFiles, before
from tests.kit.pool import run_ranks, start_ranks
from tests.kit.seams import use

RANK_TIMEOUT, SAVE_TIMEOUT, DATA_TIMEOUT = 2.0, 4.0, 3.0
# What comes on top of a timeout: the ranks that are there get 3 s to say so; the rest is a machine with other work.
GRACE = 3.0 + 3.0


class PlantedError(RuntimeError):
    """What the failing rank meets."""


class Failure:
    """What happens to the failing rank, once, when it gets to `step`; nothing at all on the others."""

    def __init__(self, kind: str, step: str, victim: int) -> None:
        self.kind, self.step = kind, step if dist.get_rank() == victim else ""

    def at(self, step: str) -> None:
        if step != self.step:
            return
        self.step = ""
        if self.kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.kind == "exit":
            os._exit(3)
        else:
            raise PlantedError("planted")


class Provider(MetricPropertyProvider):
    def __init__(self, failure: Failure) -> None:
        super().__init__()
        self._failure = failure

    def higher_is_better(self, metric_key: str) -> bool:
        self._failure.at("check the settings")
        return super().higher_is_better(metric_key)


class Metric:
    """A number that has to be computed first, as one on an accelerator."""

    def __init__(self, failure: Failure, value: float) -> None:
        self._failure, self._value = failure, value

    def __float__(self) -> float:
        self._failure.at("read the metric")
        return self._value


def sharded_model() -> nn.Module:
    group = dist.new_group(timeout=timedelta(seconds=DATA_TIMEOUT))
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    return fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))


def whole_run(folder: Path, kind: str, step: str, victim: int):
    """The error that this rank got, after how many seconds, and what the keeper then said, each with its seconds."""
    failure = Failure(kind, step, victim)
    phase = "the constructor"
    model = sharded_model() if step == "gather the weights" else nn.Linear(6, 6)
    gathered = 0
    move = ShardTransfer.move

    def move_or_fail(transfer: ShardTransfer, tensor: DTensor, *arguments) -> torch.Tensor:
        nonlocal gathered
        gathered += 1
        if gathered == 2:
            failure.at("gather the weights")
        return move(transfer, tensor, *arguments)

    def fail(operation: Operation) -> None:
        if operation.name in ("append", "write", "sync"):
            failure.at(f"{operation.name} in {phase}")

    keeper = error = None
    with pytest.MonkeyPatch.context() as patch, use(folder, files=SteppedFiles(before(fail))):
        patch.setattr(ShardTransfer, "move", move_or_fail)
        model.register_state_dict_pre_hook(lambda *_: failure.at(f"list the weights in {phase}"))
        model.register_load_state_dict_pre_hook(lambda *_: failure.at(f"place the weights in {phase}"))
        dist.barrier()  # ranks that have not started yet are no failure
        started = time.monotonic()
        try:
            keeper = BestKeeper(
                model, directory=folder, metric_key="loss/val", metric_property_provider=Provider(failure),
                rank_timeout=RANK_TIMEOUT, save_timeout=SAVE_TIMEOUT,
            )  # fmt: skip
            phase = "start"
            with keeper:
                phase = "observe"
                for epoch, value in enumerate([3.0, 2.0], start=1):
                    started = time.monotonic()
                    failure.at("before observe")
                    keeper.observe(Metric(failure, value), TrainingIteration(epoch=epoch))
                phase, started = "flush", time.monotonic()
                failure.at("before flush")
                keeper.flush()
                phase, started = "load", time.monotonic()
                keeper.restore_best()
                phase, started = "close", time.monotonic()
                failure.at("before close")
        except (KeepBestError, PlantedError) as raised:
            error = raised
        seconds = time.monotonic() - started
        is_over = keeper is None or phase == "close" or isinstance(error, PlantedError)
        return error, seconds, [] if is_over else afterwards(keeper)


def afterwards(keeper: BestKeeper):
    """What the keeper says after a failure, through the doors that are still open once the block is left."""
    keeper._phase = "started"
    said = []
    for call in (lambda: keeper.observe(1.0, TrainingIteration(epoch=9)), keeper.flush, keeper.close):
        started = time.monotonic()
        try:
            call()
            said.append((None, time.monotonic() - started))
        except KeepBestError as error:
            said.append((type(error), time.monotonic() - started))
    return said


# step -> the rank that fails (of `world_size`), what the error must call it, and the timeout that bounds the others
def first(world_size: int) -> int:
    return 0


def last(world_size: int) -> int:
    return world_size - 1


STEPS = {
    "check the settings": (last, "check the settings", RANK_TIMEOUT),
    "append in start": (first, "open", RANK_TIMEOUT),
    "before observe": (last, "observe loss/val", RANK_TIMEOUT),
    "read the metric": (last, "observe loss/val", RANK_TIMEOUT),
    "list the weights in observe": (last, "list the weights", RANK_TIMEOUT),
    "gather the weights": (last, "gather", max(DATA_TIMEOUT, SAVE_TIMEOUT)),
    "write in observe": (first, "save the new best of loss/val at E1", SAVE_TIMEOUT),
    "before flush": (last, "flush", SAVE_TIMEOUT),
    "sync in flush": (first, "flush", SAVE_TIMEOUT),
    "list the weights in load": (last, "find the saved parts", RANK_TIMEOUT),
    "place the weights in load": (last, "load the weights", RANK_TIMEOUT),
    "before close": (last, "close", SAVE_TIMEOUT),
    "sync in close": (first, "close", SAVE_TIMEOUT),
}
OUTSIDE = ("before observe", "before flush", "before close")  # in the user's code: it raises there and nowhere else
FOR_THREE = ("append in start", "read the metric", "gather the weights", "write in observe", "before close")
FOR_TWO = tuple(step for step in STEPS if step not in FOR_THREE)
CASES = [(size, kind, steps) for size, steps in ((2, FOR_TWO), (3, FOR_THREE)) for kind in ("raise", "stop", "exit")]


@pytest.mark.parametrize(("world_size", "kind", "steps"), CASES)
def test_no_failure_of_a_rank_leaves_another_waiting(world_size, kind, steps, tmp_path):
    with ExitStack() as stack:  # at once, since most of it is waiting
        running = {}
        for number, step in enumerate(steps):
            victim = STEPS[step][0](world_size)
            ranks = start_ranks(whole_run, world_size, tmp_path / str(number), kind, step, victim)
            running[step] = victim, stack.enter_context(ranks)
        faults = []
        for step, (victim, ranks) in running.items():
            told = [rank for rank in range(world_size) if kind == "raise" or rank != victim]
            for outcome in ranks.collect(ranks=told):
                assert not outcome.failed, (step, outcome)
                faults += [(step, outcome.rank, text) for text in complaints(world_size, kind, step, victim, outcome)]
    assert faults == []


def complaints(world_size: int, kind: str, step: str, victim: int, outcome) -> list[str]:
    error, seconds, said = outcome.result
    _, called, timeout = STEPS[step]
    found = []
    if seconds > timeout + GRACE:
        found.append(f"took {seconds:.1f} s")
    in_gather = step == "gather the weights"
    if kind == "raise" and step in OUTSIDE and outcome.rank == victim:
        if type(error) is not PlantedError:
            found.append(f"leaving the block turned its error into {error!r}")
        return found
    agreed = kind == "raise" and step not in OUTSIDE and not in_gather
    if agreed and not (type(error) is RankFailedError and f"rank {victim} of {world_size}: PlantedError" in str(error)):
        found.append(f"the error does not name the rank: {error!r}")
    # A rank whose shards have arrived is through with the gather, and waits in the next step.
    told = called in str(error) or (in_gather and "save the new best" in str(error))
    if not isinstance(error, RankFailedError | RankTimeoutError) or not told:
        found.append(f"the error does not tell the step: {error!r}")
    must_time_out = kind == "stop" or (kind == "raise" and step in OUTSIDE)
    if must_time_out and not in_gather and type(error) is not RankTimeoutError:
        found.append(f"no timeout: {error!r}")
    # Of ranks that died, the first to notice leaves too, and the next one waits for both; so it is after a gather.
    absent = f"did not arrive: {victim}."
    waits_for_all = kind == "exit" or in_gather
    if type(error) is RankTimeoutError and not waits_for_all and absent not in str(error):
        found.append(f"the timeout does not name the rank: {error!r}")
    if agreed:
        # Everybody knows, nobody is lost: the ranks could go on. Nothing may hang.
        if any(after > timeout + GRACE for _, after in said):
            found.append(f"slow after an agreed error: {said}")
    elif any(kind_of is not PoisonedError or after > 1.0 for kind_of, after in said):
        found.append(f"not refused at once afterwards: {said}")
    return found


def slow_write(folder: Path):
    slept = []

    def be_slow_once(operation: Operation) -> None:
        if operation.name == "create" and not slept:
            slept.append(operation.name)
            time.sleep(3.0)  # is the slow disk

    model = nn.Linear(2, 2)
    with use(folder, files=SteppedFiles(before(be_slow_once))):
        dist.barrier()
        settings = {"rank_timeout": 2.0, "save_timeout": 10.0}
        with BestKeeper(model, directory=folder, metric_key="loss", higher_is_better=False, **settings) as keeper:
            outcomes = [keeper.observe(value, TrainingIteration(epoch=n)) for n, value in enumerate([2.0, 3.0, 1.0], 1)]
    return [outcome.is_new_best for outcome in outcomes], slept


def test_slow_disk_trips_no_timeout(tmp_path):
    (bests, slept), (bests_of_1, _) = run_ranks(slow_write, 2, tmp_path)
    assert bests == bests_of_1 == [True, False, True]
    assert slept == ["create"]

"""Hooks on a new best: when they are called, on which ranks, with what, and what follows where one fails."""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
from collections import UserList
from functools import partial, wraps
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from keepbest import EveryRank
from keepbest.errors import ConfigError, DesyncError, KeepBestError, RankFailedError, RankLostError, SnapshotError
from keepbest.run.verify import verify
from tests.kit.files import Operation, SteppedFiles, before
from tests.kit.pool import run_ranks, start_ranks
from tests.kit.runs import Run, ledger, refs, saved_at, snapshots
from tests.kit.seams import use
from tests.saving.gate import Gate

REF = "best_model.loss"


class Calls(list):
    """What a hook was called with, and the update whose weights lay at its path then."""

    def __call__(self, outcome, path):
        weights = torch.load(path / "model.pt", weights_only=True)["weight"].item()
        self.append((str(outcome.iteration), outcome.value, outcome.is_new_best, path.name, int(weights)))


def keep(directory: Path, settings: dict):
    of_rank_0, of_every_rank = Calls(), Calls()
    run = Run(directory, on_new_best=[of_rank_0, EveryRank(of_every_rank)], **settings)
    with run.keeper:
        run.observe(math.nan, 5.0, 6.0, 4.0, 4.0, math.inf)
        run.keeper.flush()
        run.observe(7.0, 3.0, first=7)
    return list(of_rank_0), list(of_every_rank)


@pytest.mark.parametrize("settings", [{}, {"async_save": True}, {"keep_top_k": 3}], ids=str)
@pytest.mark.parametrize("world_size", [1, 2])
def test_hooks_are_called_once_for_each_new_best(settings, world_size, tmp_path):
    results = run_ranks(keep, world_size, tmp_path, settings)
    expected = [("U2", 5.0, True, "U2", 2), ("U4", 4.0, True, "U4", 4), ("U8", 3.0, True, "U8", 8)]
    assert results[0] == (expected, expected)
    assert results[1:] == [([], expected)] * (world_size - 1)


def replace_before_the_call(directory: Path):
    calls, gate = Calls(), Gate("model.pt")
    with use(directory, files=SteppedFiles(before(gate))):
        run = Run(directory, async_save=True, on_new_best=EveryRank(calls))
        run.observe(5.0, 4.0, 6.0)  # the first is being written, the second waits for its turn
        early = list(calls)
        gate.is_open.set()
        run.keeper.flush()
        late = [name for name, *_ in calls]
        run.keeper.close()
    return early, late


def test_hook_in_the_background_waits_for_the_disk(tmp_path):
    assert run_ranks(replace_before_the_call, 2, tmp_path) == [([], ["U1", "U2"])] * 2
    assert snapshots(tmp_path) == {"U2"}, "what was kept for a hook alone stays"
    assert verify(tmp_path) == []


def use_the_keeper_in_a_hook(directory: Path):
    calls, gate, observed_by_hook = Calls(), Gate("model.pt"), {1: 6.0, 2: 5.0}

    def use_it(outcome, path) -> None:
        run.keeper.flush()
        if (value := observed_by_hook.get(outcome.iteration.update)) is not None:
            run.observe(value, first=10 * outcome.iteration.update)

    with use(directory, files=SteppedFiles(before(gate))):
        run = Run(directory, async_save=True, keep_top_k=9, on_new_best=[EveryRank(use_it), EveryRank(calls)])
        run.observe(9.0, 8.0)
        gate.is_open.set()
        run.keeper.flush()
        run.keeper.flush()
        run.keeper.close()
    return [name for name, *_ in calls]


def test_hook_may_use_the_keeper_on_every_rank(tmp_path):
    assert run_ranks(use_the_keeper_in_a_hook, 2, tmp_path) == [["U1", "U2", "U10", "U20"]] * 2


def use_the_keeper_on_rank_0_alone(directory: Path):
    run = Run(directory, on_new_best=lambda *_: run.keeper.flush())
    with pytest.raises(KeepBestError) as caught:
        run.observe(5.0)
    run.keeper.abandon()
    return str(caught.value.__cause__ or caught.value)


def test_hook_of_rank_0_that_uses_the_keeper_is_said_on_both(tmp_path):
    for message in run_ranks(use_the_keeper_on_rank_0_alone, 2, tmp_path):
        assert f"rank 0: flush {REF}\n  rank 1: call on_new_best of {REF} at U1" in message


def close_in_a_hook(directory: Path):
    calls, gate = Calls(), Gate("model.pt")
    with use(directory, files=SteppedFiles(before(gate))):
        hooks = [EveryRank(lambda *_: run.keeper.close()), EveryRank(calls)]
        run = Run(directory, async_save=True, keep_top_k=9, on_new_best=hooks)
        run.observe(9.0, 8.0)
        gate.is_open.set()
        run.keeper.flush()
    return [name for name, *_ in calls]


def test_hook_that_closes_the_keeper_is_the_last(tmp_path):
    assert run_ranks(close_in_a_hook, 2, tmp_path) == [["U1"]] * 2


@pytest.mark.parametrize("leave", ["abandon", "drop"])
def test_best_that_no_hook_was_called_for_is_kept_no_longer(leave, tmp_path, caplog):
    gate, calls = Gate("model.pt"), Calls()
    with use(tmp_path, files=SteppedFiles(before(gate))):
        other = Run(tmp_path, metric_key="acc", async_save=True)
        run = Run(tmp_path, async_save=True, on_new_best=calls)
        with other.keeper:
            run.observe(5.0, 4.0, 3.0)
            if leave == "abandon":
                run.keeper.abandon()  # while the first one is being written
            del run
            gate.is_open.set()
            other.observe(0.5, first=4)
    assert calls == []
    assert verify(tmp_path) == []
    assert "on_new_best was not called for 5.0 at U1" in caplog.text


def test_forked_process_says_nothing_of_hooks(tmp_path, caplog):
    run = Run(tmp_path, async_save=True, on_new_best=Calls())
    run.observe(5.0)
    run.keeper._run.worker.drain()  # the seam: committed, and not looked for yet
    if (child := os.fork()) == 0:
        try:
            run.keeper.abandon()
        finally:
            os._exit("was not called" in caplog.text)
    assert os.waitpid(child, 0)[1] == 0
    run.keeper.close()


def lose_a_best(directory: Path):
    def refuse(operation: Operation) -> None:
        if operation.name == "create" and operation.path.parent.name == ".tmp-U2":
            raise OSError(28, "No space left on device")

    calls = Calls()
    with use(directory, files=SteppedFiles(before(refuse))):
        run = Run(directory, async_save=True, on_save_error="warn", on_new_best=EveryRank(calls))
        with run.keeper:
            run.observe(5.0, 4.0)
            run.keeper.flush()
            run.observe(4.5, first=3)
    return [name for name, *_ in calls]


def test_best_that_could_not_be_written_is_not_reported(tmp_path):
    assert run_ranks(lose_a_best, 2, tmp_path) == [["U1", "U3"]] * 2


def raise_once(victim: int, error: Exception, outcome, path) -> None:
    if outcome.value == 5.0 and dist.get_rank() == victim:
        raise error


def observe_and_flush(run: Run) -> None:
    run.observe(5.0)
    run.keeper.flush()


def go_on_after_a_failure(directory: Path, victim: int, error: Exception, settings: dict):
    calls = Calls()
    hooks = [EveryRank(partial(raise_once, victim, error)), EveryRank(calls)]
    run = Run(directory, on_save_error="warn", on_new_best=hooks, **settings)
    with pytest.raises(KeepBestError, match="on_new_best") as caught:
        observe_and_flush(run)
    run.observe(6.0, 4.0, first=2)
    run.keeper.close()
    return type(caught.value), str(caught.value), [name for name, *_ in calls], run.keeper.state.to_json()


@pytest.mark.parametrize("settings", [{}, {"async_save": True}], ids=str)
@pytest.mark.parametrize(
    ("victim", "error", "expected"),
    [
        (0, ValueError("no such project"), RankFailedError),
        (0, ConnectionError("no such host"), RankFailedError),  # an OSError, and none of the run folder
        (1, SnapshotError("not there"), SnapshotError),
    ],
    ids=["rank 0", "network", "rank 1"],
)
def test_hook_that_raises_is_an_error_on_every_rank(settings, victim, error, expected, tmp_path):
    results = run_ranks(go_on_after_a_failure, 2, tmp_path, victim, error, settings)
    for rank, (kind, message, calls, _) in enumerate(results):
        assert kind is expected
        assert calls == (["U3"] if rank == victim else ["U1", "U3"])
        assert f"failed to call on_new_best of {REF} at U1 on rank {victim} of 2" in message
        assert str(error) in message
    # Nothing is lost: both bests, and the interval between them, are as without the hook.
    assert results[0][3] == results[1][3]
    assert [line["value"] for line in ledger(tmp_path) if "value" in line] == [5.0, 6.0, 4.0]
    assert saved_at(tmp_path, REF) == 3


def die_in_the_hook(directory: Path) -> None:
    def die(outcome, path) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    Run(directory, on_new_best=die, save_timeout=20.0).observe(5.0)


def test_death_in_a_hook_costs_no_best(tmp_path):
    with start_ranks(die_in_the_hook, 2, tmp_path) as ranks:
        [_, other] = ranks.collect(30)
    assert isinstance(other.exception, RankLostError)
    assert saved_at(tmp_path, REF) == 1
    run = Run(tmp_path, resume="ledger")
    with run.keeper:
        assert not run.observe(6.0, first=2)[0].is_new_best
    assert refs(tmp_path) == {REF: "U1"}


def test_interrupted_hook_leaves_the_keeper_usable(tmp_path):
    def interrupt(outcome, path) -> None:
        if outcome.value == 5.0:
            raise KeyboardInterrupt

    run = Run(tmp_path, on_new_best=interrupt)
    with run.keeper:
        with pytest.raises(KeyboardInterrupt):
            run.observe(5.0)
        run.observe(4.0, first=2)
    assert (snapshots(tmp_path), saved_at(tmp_path, REF)) == ({"U2"}, 2)


def differ(directory: Path) -> None:
    Run(directory, on_new_best=print if dist.get_rank() == 0 else None)


def test_ranks_with_different_hooks_are_refused(tmp_path):
    with start_ranks(differ, 2, tmp_path) as ranks:
        for outcome in ranks.collect():
            assert isinstance(outcome.exception, DesyncError)
            assert "\n  rank 0: on_new_best=['rank 0']\n  rank 1: on_new_best=[]\n" in str(outcome.exception)


@pytest.mark.parametrize("kind", [tuple, UserList])  # such as the lists that Hydra makes
def test_hooks_may_be_any_sequence(kind, tmp_path):
    seen = []
    run = Run(tmp_path, on_new_best=kind([lambda outcome, _: seen.append(outcome.value)] * 2))
    run.observe(1.0)
    assert seen == [1.0, 1.0]


@pytest.mark.parametrize(
    "hooks", ["print", [print, 3], EveryRank("print"), {"a": print}], ids=["text", "list", "wrapped", "dict"]
)
def test_what_is_no_hook_is_refused(hooks, tmp_path):
    with pytest.raises(ConfigError, match="a function of an outcome and a path"):
        Run(tmp_path, on_new_best=hooks)


class Counted:
    def __call__(self, outcome):
        raise RuntimeError("nobody calls this")


@pytest.mark.parametrize(
    "hook",
    [lambda: None, EveryRank(lambda _: None), Counted(), Counted],
    ids=["none", "one, on every rank", "one, in a class", "a class"],
)
def test_hook_that_takes_other_arguments_is_refused(hook, tmp_path):
    with pytest.raises(ConfigError, match=r"which cannot be called with these two: .*argument"):
        Run(tmp_path / "run", on_new_best=hook)
    assert not (tmp_path / "run").exists()


def with_a_client(function):
    @wraps(function)
    def call(*arguments):
        return function("client", *arguments)

    return call


@with_a_client
def upload(client, outcome, path):
    raise RuntimeError("nobody calls this")


@pytest.mark.parametrize(
    "hook", [print, partial(print, 1), max, EveryRank(dict.fromkeys), upload, EveryRank(partial(upload))]
)
def test_hook_that_takes_more_is_taken(hook, tmp_path):
    assert Run(tmp_path, on_new_best=hook).keeper.state.best is None


async def await_it(outcome, path):
    raise RuntimeError("nobody calls this")


def yield_it(outcome, path):
    yield RuntimeError("nobody calls this")


class AwaitIt:
    async def __call__(self, outcome, path):
        raise RuntimeError("nobody calls this")


@pytest.mark.parametrize("hook", [await_it, yield_it, EveryRank(await_it), partial(await_it), AwaitIt()])
def test_hook_whose_body_would_never_run_is_refused(hook, tmp_path):
    with pytest.raises(ConfigError, match=r"must be an ordinary function .* it is async or a generator"):
        Run(tmp_path, on_new_best=hook)


@pytest.mark.parametrize("settings", [{}, {"async_save": True}], ids=str)
def test_new_best_is_logged_with_the_one_before_it(settings, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="keepbest.new_best")
    run = Run(tmp_path, keep_top_k=2, **settings)
    with run.keeper:
        run.observe(5.0, 6.0, 0.25)
    where = tmp_path / "checkpoints" / "snapshots"
    assert [record.getMessage() for record in caplog.records] == [
        f"{REF}: new best 5.0 at U1 (the first): {where / 'U1'}",
        f"{REF}: new best 0.25 at U3 (before it 5.0 at U1): {where / 'U3'}",
    ]


def test_run_that_is_left_says_for_which_best_no_hook_was_called(tmp_path, caplog):
    gate, calls = Gate("model.pt"), Calls()
    with use(tmp_path, files=SteppedFiles(before(gate))):
        run = Run(tmp_path, async_save=True, on_new_best=calls)
        run.observe(5.0)
        gate.is_open.set()
        run.keeper.abandon()
    assert calls == []
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        f"{REF}: on_new_best was not called for 5.0 at U1, since the run was left before"
    ]


EXITING = """
import sys, torch
from keepbest import BestKeeper
settings = {"async_save": True, "on_new_best": lambda *_: print("called")}
keeper = BestKeeper(torch.nn.Linear(1, 1), directory=sys.argv[1], metric_key="loss", **settings)
keeper.observe(5.0, epoch=1)
"""


def test_exit_says_for_which_best_no_hook_was_called(tmp_path):
    arguments = [sys.executable, "-c", EXITING, str(tmp_path)]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == ""
    assert ended.stderr == f"{REF}: on_new_best was not called for 5.0 at E1, since the run was left before\n"
    assert refs(tmp_path) == {REF: "E1"}

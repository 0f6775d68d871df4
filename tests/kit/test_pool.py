from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from keepbest.errors import ConfigError
from tests.kit.child import announce, pause
from tests.kit.pool import RankDiedError, RanksHungError, run_ranks, start_ranks


def sum_of_ranks(offset: int) -> tuple[int, torch.Tensor]:
    value = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(value)
    return dist.get_rank(), value


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        print("rank 1 says why")
        raise ConfigError("expected a setting, found none")
    dist.broadcast(torch.zeros(1), src=1)


def hang_on_rank_1() -> None:
    if dist.get_rank() == 1:
        threading.Event().wait()


def die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(3)


def pause_then_return(folder: Path) -> str:
    pause("ready")
    return (folder / "from_parent").read_text()


def announce_then_wait_for_rank_0() -> None:
    announce("waiting")
    if dist.get_rank() == 0:
        pause("holding the others up")
    dist.broadcast(torch.zeros(1), src=0)


def has_process_group() -> bool:
    return dist.is_initialized()


def raise_what_cannot_be_pickled() -> None:
    class LocalError(Exception):
        pass

    raise LocalError("only known here")


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_results_come_back_in_order_of_rank(world_size: int):
    results = run_ranks(sum_of_ranks, world_size, 10)
    expected = float(sum(10 + rank for rank in range(world_size)))
    assert results == [(rank, torch.tensor([expected])) for rank in range(world_size)]


def test_there_is_no_process_group_without_init():
    assert run_ranks(has_process_group, 1, init=False) == [False]
    assert run_ranks(has_process_group, 1) == [True]


def test_first_exception_has_the_traceback_of_its_rank(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ConfigError, match="expected a setting") as caught:
        run_ranks(fail_on_rank_1, 2)
    assert "rank 1 of 2: Traceback" in str(caught.value.__cause__)
    assert "in fail_on_rank_1" in str(caught.value.__cause__)
    assert "rank 1 says why" in capsys.readouterr().out


def test_exception_that_cannot_be_pickled_is_reported_as_text():
    with pytest.raises(RankDiedError, match="LocalError: only known here"):
        run_ranks(raise_what_cannot_be_pickled, 1)


def test_hung_rank_is_named_with_its_stack_and_killed():
    start = time.monotonic()
    with start_ranks(hang_on_rank_1, 2) as ranks, pytest.raises(RanksHungError) as caught:
        ranks.collect(timeout=1.0)
    assert time.monotonic() - start < 10
    assert str(caught.value).startswith("rank 1 of 2 did not finish in time")
    assert "in hang_on_rank_1" in str(caught.value)
    assert ranks.processes[1].exitcode == -signal.SIGKILL


def test_run_ranks_fails_on_a_hung_rank():
    with pytest.raises(RanksHungError, match="rank 1 of 2"):
        run_ranks(hang_on_rank_1, 2, timeout=0.5)


def test_rank_that_exits_without_an_outcome_is_named():
    with pytest.raises(RankDiedError, match="rank 1 of 2: the process ended without an outcome, exit code 3"):
        run_ranks(die_on_rank_1, 2)


def test_rank_waits_for_the_test_and_returns(tmp_path: Path):
    with start_ranks(pause_then_return, 2, tmp_path) as ranks:
        for rank in (0, 1):
            ranks.wait_for(rank, "ready")
        (tmp_path / "from_parent").write_text("go")
        for rank in (0, 1):
            ranks.resume(rank)
        outcomes = ranks.collect()
    assert [(outcome.result, outcome.exit_code) for outcome in outcomes] == [("go", 0), ("go", 0)]


def test_killed_rank_and_the_others_have_their_own_outcomes():
    with start_ranks(announce_then_wait_for_rank_0, 2) as ranks:
        ranks.wait_for(1, "waiting")
        ranks.wait_for(0, "holding the others up")
        ranks.signal(0, signal.SIGKILL)
        killed, other = ranks.collect(timeout=20)
    assert killed.exit_code == -signal.SIGKILL
    assert "killed by SIGKILL" in killed.traceback
    assert isinstance(other.exception, RuntimeError)


def test_stopped_rank_can_be_left_out_and_continued(tmp_path: Path):
    (tmp_path / "from_parent").write_text("go")
    with start_ranks(pause_then_return, 2, tmp_path) as ranks:
        ranks.wait_for(1, "ready")
        ranks.signal(1, signal.SIGSTOP)
        ranks.resume(0)
        ranks.resume(1)
        assert [outcome.result for outcome in ranks.collect(ranks=[0])] == ["go"]
        ranks.signal(1, signal.SIGCONT)
        assert [outcome.result for outcome in ranks.collect()] == ["go", "go"]


def test_waiting_for_what_is_never_announced_names_the_outcome():
    with start_ranks(has_process_group, 1) as ranks, pytest.raises(RankDiedError, match="ended before it announced"):
        ranks.wait_for(0, "something else")

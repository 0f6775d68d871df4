from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist

from keepbest.errors import DesyncError, PoisonedError, RankLostError
from keepbest.ranks import Ranks
from tests.kit.child import announce, pause
from tests.kit.pool import run_ranks, start_ranks


def polls(raised_before: dict[int, int], count: int) -> list[bool]:
    ranks = Ranks.connect()
    flag = ranks.flag()
    seen = []
    for number in range(count):
        if raised_before.get(ranks.rank) == number:
            flag.raise_it()
        seen.append(flag.poll())
        ranks.agree("do something else meanwhile", lambda: None)
    return seen


@pytest.mark.parametrize(
    ("world_size", "raised_before", "seen"),
    [
        (1, {0: 1}, [False, False, True, True]),
        (2, {}, [False] * 4),
        (2, {1: 0}, [False, True, True, True]),
        (3, {2: 1, 1: 2}, [False, False, True, True]),
        (3, {0: 3}, [False] * 4),
    ],
)
def test_all_ranks_see_a_flag_one_poll_after_it_was_sent(world_size, raised_before, seen):
    assert run_ranks(polls, world_size, raised_before, 4) == [seen] * world_size


def poll_while_the_other_is_away() -> list[bool]:
    flag = Ranks.connect().flag()
    if dist.get_rank() == 1:
        pause("away")
    first = flag.poll()
    announce("polled")
    return [first, flag.poll()]


def test_first_poll_waits_for_nobody_and_the_next_for_its_news():
    with start_ranks(poll_while_the_other_is_away, 2) as ranks:
        ranks.wait_for(1, "away", timeout=30)
        ranks.wait_for(0, "polled", timeout=30)
        ranks.resume(1)
        assert [outcome.result for outcome in ranks.collect(timeout=30)] == [[False, False]] * 2


def poll_until_the_other_is_gone() -> None:
    flag = Ranks.connect().flag()
    flag.poll()
    flag.poll()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    for _ in range(3):
        flag.poll()


def test_rank_that_died_is_noticed_by_the_next_polls():
    with start_ranks(poll_until_the_other_is_gone, 2) as ranks:
        outcomes = ranks.collect(timeout=60)
    assert outcomes[1].exit_code == -signal.SIGKILL
    assert isinstance(outcomes[0].exception, RankLostError)
    assert "lost contact with another rank in step 'ask whether a rank" in str(outcomes[0].exception)


def poll_while_others_do_not() -> str:
    ranks = Ranks.connect()
    if ranks.rank > 0:
        with pytest.raises(DesyncError) as caught:
            ranks.agree("end", lambda: None)
    else:
        flag = ranks.flag()
        flag.poll()
        with pytest.raises(DesyncError) as caught:
            flag.poll()
    with pytest.raises(PoisonedError):
        ranks.agree("end", lambda: None)
    return str(caught.value)


@pytest.mark.parametrize("world_size", [2, 3])
def test_rank_that_polls_alone_is_named_at_once(world_size):
    polling, *others = run_ranks(poll_while_others_do_not, world_size, timeout=60)
    others_do = ", ".join(map(str, range(1, world_size)))
    for message, step in [(polling, "something else"), *((other, "end") for other in others)]:
        lines = ["  rank 0: ask whether a rank has raised its flag", f"  rank {others_do}: {step}"]
        assert message.splitlines()[:-1] == ["the ranks are not in the same step:", *lines]


def poll_while_another_one_fails() -> str:
    ranks = Ranks.connect()
    if ranks.rank == 1:
        with pytest.raises(DesyncError) as caught:
            ranks.agree("save", lambda: 1 / 0)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    else:
        flag = ranks.flag()
        flag.poll()
        with pytest.raises(DesyncError) as caught:
            flag.poll()
    return str(caught.value)


@pytest.mark.parametrize("world_size", [2, 3])
def test_rank_that_polls_learns_who_failed_meanwhile(world_size):
    messages = run_ranks(poll_while_another_one_fails, world_size, timeout=60)
    found = [next(line for line in message.splitlines() if line.startswith("  rank 1:")) for message in messages]
    expected = ["  rank 1: something else, which failed there"] * world_size
    expected[1] = "  rank 1: save, which failed there"
    assert found == expected


def profile_polls() -> list[str]:
    flag, names = Ranks.connect().flag(), []
    for _ in range(3):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            flag.poll()
        names += [event.name for event in profile.events() if event.name.startswith("gloo:")]
    return names


@pytest.mark.parametrize("world_size", [2, 3])
def test_poll_that_spans_two_profiles_is_in_neither(world_size):
    # An event that begins in one profile and ends in another one makes torch write into freed memory.
    assert run_ranks(profile_polls, world_size) == [[]] * world_size

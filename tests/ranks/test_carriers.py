"""Both ways in which bytes travel from each rank to all others, and what is said of ranks that do not come."""

from __future__ import annotations

import gc
import os
import threading
import time
from unittest.mock import Mock

import pytest

from keepbest.errors import PoisonedError, RankLostError, RankTimeoutError
from keepbest.ranks import Number, Ranks, control_group
from keepbest.ranks.direct import Direct
from keepbest.ranks.ring import Ring
from tests.kit.pool import run_ranks, start_ranks

CARRIERS = {"direct": Direct, "ring": Ring}


def connect(name: str, rank_timeout: float = 120.0) -> Ranks:
    """The ranks, connected as few or as many would be."""
    with pytest.MonkeyPatch.context() as patch:
        # A world of so many ranks that it has a ring would take minutes here.
        patch.setattr(control_group, "LARGEST_MESH", 32 if name == "direct" else 1)
        ranks = Ranks.connect(rank_timeout=rank_timeout)
    assert type(ranks._control._carrier) is CARRIERS[name]
    return ranks


def exchange_all_sizes(name: str) -> list[list[str]]:
    ranks = connect(name)
    numbers = [ranks.exchange("count", Number(float(ranks.rank), float(count))) for count in range(20)]
    assert [[each.value for each in found] for found in numbers] == [list(range(ranks.world_size))] * 20
    # A long text is longer than what a socket takes at once.
    return [ranks.gather_json("write", lambda size=size: f"{ranks.rank}" * size) for size in (0, 1, 1_000_000, 10)]


@pytest.mark.parametrize("name", CARRIERS)
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_each_rank_receives_what_all_ranks_sent(name, world_size):
    texts = [[f"{rank}" * size for rank in range(world_size)] for size in (0, 1, 1_000_000, 10)]
    assert run_ranks(exchange_all_sizes, world_size, name) == [texts] * world_size


def wait_for_absent_ranks(name: str) -> str:
    ranks = connect(name, rank_timeout=1.5)
    ranks.agree("meet", lambda: None)
    if ranks.rank in (1, 3):
        time.sleep(7)  # nobody comes while the others wait, and look for them
        return ""
    if ranks.rank == 4:
        time.sleep(1)  # comes later than the others, and is not missed
    with pytest.raises(RankTimeoutError) as caught:
        ranks.exchange("wait for the others", Number(0.0, None))
    with pytest.raises(PoisonedError):
        ranks.agree("meet again", lambda: None)
    return str(caught.value)


@pytest.mark.parametrize("name", CARRIERS)
def test_each_rank_names_those_that_did_not_arrive(name):
    messages = run_ranks(wait_for_absent_ranks, 5, name)
    for rank in (0, 2, 4):
        assert f"rank {rank} of 5 waited 1.5 s in step 'wait for the others'" in messages[rank]
        assert "ranks that did not arrive: 1, 3." in messages[rank]


def lose_a_rank(name: str) -> float:
    ranks = connect(name)
    ranks.agree("meet", lambda: None)
    if ranks.rank == 2:
        os._exit(1)
    started = time.monotonic()
    with pytest.raises(RankLostError, match="lost contact with another rank in step 'wait for the others'"):
        ranks.exchange("wait for the others", Number(0.0, None))
    return time.monotonic() - started


@pytest.mark.parametrize("name", CARRIERS)
def test_rank_that_died_is_noticed_at_once(name):
    with start_ranks(lose_a_rank, 3, name) as ranks:
        assert max(outcome.result for outcome in ranks.collect(ranks=[0, 1])) < 10


def time_out_without_a_thread() -> str:
    ranks = connect("ring", rank_timeout=0.5)
    if ranks.rank == 1:
        time.sleep(1)  # is the rank that does not come in time
        return ""
    with pytest.MonkeyPatch.context() as patch:
        # No more threads can be started by a process that has as many as it may have.
        patch.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError("can't start new thread")))
        with pytest.raises(RankTimeoutError) as caught:
            ranks.exchange("wait for rank 1", Number(0.0, None))
    return str(caught.value)


def test_timeout_without_a_thread_to_look_for_ranks_says_so():
    message, _ = run_ranks(time_out_without_a_thread, 2)
    assert "ranks that did not arrive: unknown (no thread to look for them can be started)" in message


def drop_flags_in_flight(name: str) -> list[float | None]:
    ranks = connect(name)
    for _ in range(20):
        flag = ranks.flag()
        flag.poll()
        if ranks.rank == 1:
            time.sleep(0.005)  # what it sends is still to come when rank 0 has dropped the flag
        del flag
        gc.collect()
    return [number.value for number in ranks.exchange("count", Number(float(ranks.rank), None))]


@pytest.mark.parametrize("name", CARRIERS)
def test_flag_that_is_dropped_in_flight_disturbs_nobody(name):
    assert run_ranks(drop_flags_in_flight, 2, name) == [[0.0, 1.0]] * 2


def interrupt_between_two_messages() -> str:
    ranks = connect("direct", rank_timeout=0.5)
    if ranks.rank == 1:
        with pytest.raises((RankTimeoutError, RankLostError)):
            ranks.exchange("meet", Number(0.0, None))
        return ""
    with pytest.MonkeyPatch.context() as patch:
        # A signal comes when it has sent to nobody yet, which only a mock can time.
        patch.setattr(ranks._control._carrier, "_send", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ranks.exchange("meet", Number(0.0, None))
    with pytest.raises(PoisonedError) as caught:
        ranks.exchange("meet", Number(0.0, None))
    return str(caught.value)


def test_rank_that_was_interrupted_while_it_sent_takes_no_part():
    message, _ = run_ranks(interrupt_between_two_messages, 2)
    assert "runs no more collectives: it was interrupted while it sent its part of step 'meet'" in message

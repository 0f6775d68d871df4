"""Both ways in which bytes travel from each rank to all others, and what is said of ranks that do not come."""

from __future__ import annotations

import gc
import os
import threading
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from unittest.mock import Mock

import pytest

from keepbest.errors import PoisonedError, RankLostError, RankTimeoutError
from keepbest.ranks import Number, Ranks
from keepbest.ranks.buffers import Buffers
from keepbest.ranks.direct import Direct
from keepbest.ranks.frame import FRAME_BYTES
from keepbest.ranks.ring import Ring, _finished_within
from tests.kit.child import in_forked_child
from tests.kit.pool import run_ranks, start_ranks

WORLDS = {2: Direct, 3: Ring, 5: Ring}
PATIENCE = timedelta(seconds=30)


def connect(rank_timeout: float = 120.0) -> Ranks:
    ranks = Ranks.connect(rank_timeout=rank_timeout)
    assert type(ranks._control._carrier) is WORLDS[ranks.world_size]
    return ranks


def exchange_all_sizes() -> list[list[str]]:
    ranks = connect()
    numbers = [ranks.exchange("count", Number(float(ranks.rank), float(count))) for count in range(20)]
    assert [[each.value for each in found] for found in numbers] == [list(range(ranks.world_size))] * 20
    # A long text is longer than what a socket takes at once.
    return [ranks.gather_json("write", lambda size=size: f"{ranks.rank}" * size) for size in (0, 1, 1_000_000, 10)]


@pytest.mark.parametrize("world_size", WORLDS)
def test_each_rank_receives_what_all_ranks_sent(world_size):
    texts = [[f"{rank}" * size for rank in range(world_size)] for size in (0, 1, 1_000_000, 10)]
    assert run_ranks(exchange_all_sizes, world_size) == [texts] * world_size


def wait_for_absent_ranks(place: Path) -> str:
    ranks = connect(rank_timeout=1.5)
    ranks.agree("meet", lambda: None)
    if ranks.rank in (1, 3):
        while len(list(place.iterdir())) < len(range(0, ranks.world_size, 2)):
            time.sleep(0.05)  # does not come while the others wait, and look for it
        return ""
    if ranks.rank == 4:
        time.sleep(1)  # comes later than the others, and is not missed
    with pytest.raises(RankTimeoutError) as caught:
        ranks.exchange("wait for the others", Number(0.0, None))
    with pytest.raises(PoisonedError):
        ranks.agree("meet again", lambda: None)
    (place / str(ranks.rank)).touch()
    return str(caught.value)


def wait_for_a_part_of_a_millisecond() -> list[bool]:
    control = connect()._control
    control.all_gather(b"meet", "meet", PATIENCE)
    store, waited = control.new_store("test"), []
    if control.rank > 0:
        store.wait(["waited"], PATIENCE)
    flight = control.start(Buffers(4, control.world_size), "meet again", PATIENCE)
    if control.rank == 0:
        # torch cuts these to milliseconds, so it waits for less.
        waited = [_finished_within(flight.works[0], timedelta(microseconds=each)) for each in (1900, 3900, 5900)]
        store.set("waited", "")
    control.finish(flight, "meet again", PATIENCE)
    return waited


def test_wait_for_a_part_of_a_millisecond_is_no_loss():
    assert run_ranks(wait_for_a_part_of_a_millisecond, 3) == [[False] * 3, [], []]


@pytest.mark.parametrize("failure", [None, RuntimeError("connection closed")])
def test_exchange_that_ends_as_a_wait_does_is_no_loss(failure):
    # That it ends between the two is what only a mock can time.
    work = Mock(wait=Mock(side_effect=[RuntimeError("timed out"), failure]), is_completed=lambda: True)
    with nullcontext() if failure is None else pytest.raises(RuntimeError, match="connection closed"):
        assert _finished_within(work, timedelta(seconds=0))


@pytest.mark.parametrize(("world_size", "absent"), [(2, "1"), (5, "1, 3")])
def test_each_rank_names_those_that_did_not_arrive(world_size, absent, tmp_path):
    messages = run_ranks(wait_for_absent_ranks, world_size, tmp_path)
    for rank in range(0, world_size, 2):
        assert f"rank {rank} of {world_size} waited 1.5 s in step 'wait for the others'" in messages[rank]
        assert f"ranks that did not arrive: {absent}." in messages[rank]


def lose_a_rank() -> float:
    ranks = connect()
    ranks.agree("meet", lambda: None)
    if ranks.rank == ranks.world_size - 1:
        os._exit(1)
    started = time.monotonic()
    with pytest.raises(RankLostError, match="lost contact with another rank in step 'wait for the others'"):
        ranks.exchange("wait for the others", Number(0.0, None))
    return time.monotonic() - started


@pytest.mark.parametrize("world_size", [2, 3])
def test_rank_that_died_is_noticed_at_once(world_size):
    with start_ranks(lose_a_rank, world_size) as ranks:
        assert max(outcome.result for outcome in ranks.collect(ranks=range(world_size - 1))) < 10


def time_out_without_a_thread() -> str:
    ranks = connect(rank_timeout=0.5)
    if ranks.rank > 0:
        time.sleep(1)  # are the ranks that do not come in time
        return ""
    with pytest.MonkeyPatch.context() as patch:
        # No more threads can be started by a process that has as many as it may have.
        patch.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError("can't start new thread")))
        with pytest.raises(RankTimeoutError) as caught:
            ranks.exchange("wait for rank 1", Number(0.0, None))
    return str(caught.value)


def test_timeout_without_a_thread_to_look_for_ranks_says_so():
    message, *_ = run_ranks(time_out_without_a_thread, 3)
    assert "ranks that did not arrive: unknown (no thread to look for them can be started)" in message


def drop_flags_in_flight() -> list[float | None]:
    ranks = connect()
    for _ in range(20):
        flag = ranks.flag()
        flag.poll()
        if ranks.rank == 1:
            time.sleep(0.005)  # what it sends is still to come when rank 0 has dropped the flag
        del flag
        gc.collect()
    return [number.value for number in ranks.exchange("count", Number(float(ranks.rank), None))]


def overtake_flags() -> list[float | None]:
    ranks, values = connect(), []
    for count in range(50):
        if ranks.rank == 0:
            time.sleep(0.005)  # finds the number of the other rank, which was sent after the flag, and not the flag
        flag = ranks.flag()
        flag.poll()
        del flag
        values += [number.value for number in ranks.exchange("count", Number(float(count), None))]
    return values


@pytest.mark.parametrize("world_size", [2, 3])
def test_number_may_overtake_a_flag_that_was_dropped(world_size):
    assert (
        run_ranks(overtake_flags, world_size)
        == [[float(count) for count in range(50) for _ in range(world_size)]] * world_size
    )


@pytest.mark.parametrize("world_size", [2, 3])
def test_flag_that_is_dropped_in_flight_disturbs_nobody(world_size):
    assert run_ranks(drop_flags_in_flight, world_size) == [[0.0, 1.0, 2.0][:world_size]] * world_size


def poll_in_a_forked_child() -> int:
    flag = Ranks.connect().flag()
    flag.poll()

    def poll() -> None:
        with pytest.raises(PoisonedError, match="was forked from process"):
            flag.poll()

    status = in_forked_child(poll)
    flag.poll()
    return status


def test_forked_child_does_not_wait_for_a_flag_in_flight():
    assert run_ranks(poll_in_a_forked_child, 2) == [0, 0]


def send_early(rounds_before: int) -> bool:
    control = connect()._control
    for _ in range(rounds_before):
        control.all_gather(b"1" * FRAME_BYTES, "meet", PATIENCE)
    store = control.new_store("test")
    if control.rank == 0:
        store.wait(["sent"], PATIENCE)
        return control.all_gather(b"2" * FRAME_BYTES, "meet again", PATIENCE) == [b"2" * FRAME_BYTES] * 2
    buffers = Buffers(FRAME_BYTES, 2)
    buffers.sent.data[:] = b"2" * FRAME_BYTES
    flight = control.start(buffers, "meet again", PATIENCE)
    is_sent = flight.works.pop().wait(PATIENCE)  # while the other rank does nothing
    store.set("sent", "")
    control.finish(flight, "meet again", PATIENCE)
    return is_sent


@pytest.mark.parametrize("rounds_before", [1, 2])
def test_frame_arrives_before_the_other_rank_does(rounds_before):
    assert run_ranks(send_early, 2, rounds_before) == [True, True]

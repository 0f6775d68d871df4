"""Both ways in which bytes travel from each rank to all others, and what is said of ranks that do not come."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from keepbest.errors import PoisonedError, RankLostError, RankTimeoutError
from keepbest.ranks import Number, Ranks
from keepbest.ranks.buffers import Buffers
from keepbest.ranks.direct import Direct
from keepbest.ranks.frame import FRAME_BYTES
from keepbest.ranks.ring import Ring
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


def interrupt_between_two_messages() -> str:
    ranks = connect(rank_timeout=0.5)
    if ranks.rank == 1:
        with pytest.raises((RankTimeoutError, RankLostError)):
            ranks.exchange("meet", Number(0.0, None))
        return ""
    with pytest.MonkeyPatch.context() as patch:
        # A signal comes before it has sent, which only a mock can time.
        patch.setattr(ranks._control._carrier, "_send", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ranks.exchange("meet", Number(0.0, None))
    with pytest.raises(PoisonedError) as caught:
        ranks.exchange("meet", Number(0.0, None))
    return str(caught.value)


def test_rank_that_was_interrupted_while_it_sent_takes_no_part():
    message, _ = run_ranks(interrupt_between_two_messages, 2)
    assert "runs no more collectives: it was interrupted while it sent its part of step 'meet'" in message


def raise_interrupt(*_):
    raise KeyboardInterrupt


def interrupt_before_texts(size: int) -> list[float | None]:
    ranks = connect(rank_timeout=0.5)
    with pytest.MonkeyPatch.context() as patch:
        if ranks.rank == 0:
            # A signal comes while the frames are on their way, which only a mock can time.
            patch.setattr(ranks._control._carrier, "wait", raise_interrupt)
        with pytest.raises(KeyboardInterrupt if ranks.rank == 0 else (RankTimeoutError, RankLostError)):
            ranks.gather_json("write", lambda: "a" * (size - len('""')))
    if ranks.rank == 0:
        with pytest.raises((RankTimeoutError, RankLostError)):
            ranks.exchange("count", Number(0.0, None))
    return []


@pytest.mark.parametrize("size", [FRAME_BYTES - 1, FRAME_BYTES, FRAME_BYTES + 1])
def test_text_is_not_taken_for_a_frame(size):
    assert run_ranks(interrupt_before_texts, 2, size) == [[], []]


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


def leave_after_the_last_exchange() -> list[float | None]:
    ranks = connect()
    ranks.exchange("meet", Number(0.0, None))
    if ranks.rank == 1:
        ranks.exchange("end", Number(1.0, None))
        os._exit(0)
    carrier = ranks._control._carrier
    receive = carrier._recv

    def receive_from_a_rank_that_has_left(*arguments):
        while not ranks._control.has_lost(1):
            time.sleep(0.01)  # nothing here reports the end of another process
        return receive(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        # The other rank leaves in the middle of an exchange that it has finished, which only a mock can time.
        patch.setattr(carrier, "_recv", receive_from_a_rank_that_has_left)
        return [number.value for number in ranks.exchange("end", Number(0.0, None))]


def test_rank_may_leave_after_the_last_exchange():
    with start_ranks(leave_after_the_last_exchange, 2) as ranks:
        [outcome] = ranks.collect(ranks=[0])
    assert outcome.result == [0.0, 1.0]


def interrupt_wait_for_texts() -> list[list[str]]:
    ranks = connect()
    carrier = ranks._control._carrier

    def interrupt(flight, timeout):
        Direct.wait(carrier, flight, timeout) if flight.buffers.size == FRAME_BYTES else raise_interrupt()

    with pytest.MonkeyPatch.context() as patch:
        if ranks.rank == 0:
            # A signal comes while the texts are on their way, which only a mock can time.
            patch.setattr(carrier, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt) if ranks.rank == 0 else contextlib.nullcontext():
            ranks.gather_json("write", lambda: "a text")
    gc.collect()  # nobody waits for what is on its way
    return [ranks.gather_json("write again", lambda count=count: f"{ranks.rank}" * count) for count in range(20)]


def test_interrupted_wait_for_texts_leaves_later_ones_right():
    texts = [["0" * count, "1" * count] for count in range(20)]
    assert run_ranks(interrupt_wait_for_texts, 2) == [texts, texts]


class PreemptedError(RuntimeError):
    """What a handler of a signal may raise."""


def raise_while_it_asks(error: type[BaseException], comes_after: bool) -> str:
    ranks = connect(rank_timeout=2.0)
    ranks.exchange("begin", Number(0.0, None))
    if ranks.rank == 1:
        ranks.exchange("meet", Number(0.0, None))
        with pytest.raises((RankTimeoutError, RankLostError)):
            ranks.exchange("meet", Number(1.0, None))
        return ""
    carrier = ranks._control._carrier
    receive = carrier._recv

    def ask_and_raise(*arguments):
        if comes_after:
            receive(*arguments)
        raise error

    with pytest.MonkeyPatch.context() as patch:
        # A signal comes when it has sent, and asks for the next frame, which only a mock can time.
        patch.setattr(carrier, "_recv", ask_and_raise)
        with pytest.raises(error):
            ranks.exchange("meet", Number(0.0, None))
    with pytest.raises(PoisonedError) as caught:
        ranks.exchange("meet", Number(1.0, None))
    return str(caught.value)


@pytest.mark.parametrize("comes_after", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, PreemptedError])
def test_rank_that_was_interrupted_after_it_sent_takes_no_part(error, comes_after):
    message, _ = run_ranks(raise_while_it_asks, 2, error, comes_after)
    assert "runs no more collectives: it was interrupted while it sent its part of step 'meet'" in message


def preempt(*_):
    raise PreemptedError


def preempt_while_it_waits() -> list[float | None]:
    ranks = connect()
    ranks.exchange("meet", Number(0.0, None))
    if ranks.rank == 1:
        time.sleep(0.5)  # longer than the signal takes
        ranks.exchange("count", Number(0.0, None))
    else:
        handler = signal.signal(signal.SIGALRM, preempt)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(PreemptedError):
            ranks.exchange("count", Number(0.0, None))
        signal.signal(signal.SIGALRM, handler)
    return [number.value for number in ranks.exchange("count", Number(1.0, None))]


@pytest.mark.parametrize("world_size", [2, 3])
def test_handler_of_a_signal_raises_its_own_error(world_size):
    assert run_ranks(preempt_while_it_waits, world_size) == [[1.0] * world_size] * world_size


def exchange_in_profiles() -> list[str]:
    ranks, names = connect(), []
    carrier = ranks._control._carrier
    for count in range(6):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            with pytest.MonkeyPatch.context() as patch:
                if count % 2:
                    # A signal comes while the numbers are on their way, which only a mock can time.
                    patch.setattr(carrier, "wait", raise_interrupt)
                with contextlib.suppress(KeyboardInterrupt):
                    ranks.exchange("count", Number(float(count), None), state=f"{count}".encode())
            torch.ones(1).exp()
        names.append([event.name for event in profile.events() if event.name.startswith(("gloo:", "aten::exp"))])
    return names


@pytest.mark.parametrize("world_size", [2, 3])
def test_exchange_that_may_span_two_profiles_is_in_neither(world_size):
    # An event that begins in one profile and ends in another one makes torch write into freed memory.
    assert run_ranks(exchange_in_profiles, world_size) == [[["aten::exp"]] * 6] * world_size


def profile_after_an_interruption() -> list[str]:
    ranks = connect(rank_timeout=1.0)
    ranks.exchange("meet", Number(0.0, None))
    with pytest.MonkeyPatch.context() as patch:
        # A signal comes as it begins to send, which only a mock can time.
        patch.setattr(ranks._control._carrier, "start", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            ranks.exchange("meet", Number(0.0, None))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(1).exp()
    return [event.name for event in profile.events() if event.name == "aten::exp"]


def test_profiles_after_an_interruption_are_complete():
    assert run_ranks(profile_after_an_interruption, 2) == [["aten::exp"]] * 2

"""What an interruption, an error of a handler, or the end of a rank leaves of exchanges, and profiles beside them."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import time
from unittest.mock import Mock

import pytest
import torch

from keepbest.errors import PoisonedError, RankLostError, RankTimeoutError
from keepbest.ranks import Number, Ranks
from keepbest.ranks.direct import Direct
from keepbest.ranks.frame import FRAME_BYTES
from tests.kit.pool import run_ranks, start_ranks
from tests.ranks.test_carriers import connect


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


def has_lost_rank_0(ranks: Ranks) -> bool:
    """Begin. Then rank 1 exchanges twice with rank 0, which fails in the first exchange. True on rank 1."""
    ranks.exchange("begin", Number(0.0, None))
    if ranks.rank == 0:
        return False
    ranks.exchange("meet", Number(0.0, None))
    with pytest.raises((RankTimeoutError, RankLostError)):
        ranks.exchange("meet", Number(1.0, None))
    return True


def raise_while_it_asks(error: type[BaseException], comes_after: bool) -> str:
    ranks = connect(rank_timeout=2.0)
    if has_lost_rank_0(ranks):
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


def take_a_signal_for_a_loss() -> str:
    ranks = connect(rank_timeout=2.0)
    if has_lost_rank_0(ranks):
        return ""
    carrier = ranks._control._carrier
    receive = carrier._recv

    def ask_and_raise(*arguments):
        receive(*arguments)
        raise RuntimeError("out of time")

    with pytest.MonkeyPatch.context() as patch:
        # One signal comes when it has asked for the next frame, and another one leaves as it then looks for the other
        # rank, which only mocks can time.
        patch.setattr(carrier, "_recv", ask_and_raise)
        patch.setattr("keepbest.ranks.direct.has_lost", lambda *_: True)
        ranks.exchange("meet", Number(0.0, None))
    with pytest.raises(RankLostError) as caught:
        ranks.exchange("meet", Number(1.0, None))
    return str(caught.value)


def test_signal_that_passes_for_a_loss_lets_no_frame_be_lost():
    message, _ = run_ranks(take_a_signal_for_a_loss, 2)
    assert "lost contact with another rank in step 'meet': out of time" in message


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

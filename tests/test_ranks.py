"""The ranks agree, or every one of them that lives learns what went wrong."""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn

from keepbest import BestKeeper, TrainingIteration
from keepbest.errors import (
    ConfigError,
    DesyncError,
    IterationError,
    KeepBestError,
    PoisonedError,
    RankFailedError,
    RankLostError,
    RankTimeoutError,
    StorageError,
)
from keepbest.ranks import Number, Ranks
from keepbest.ranks.direct import Direct
from keepbest.staging.live import LiveSlot
from tests.kit.child import announce, pause
from tests.kit.pool import run_ranks, start_ranks


class OtherLibrary:
    class StorageError(RuntimeError):
        """It has a name of ours, and says nothing of the run folder."""


def update(number):
    return TrainingIteration(update=number)


@contextmanager
def counted_collectives():
    """What this rank has gloo do, in any group: the exchanges, and else what torch's profiler sees."""
    found, start = [], Direct.start

    def count(carrier, flight, timeout):
        found.append("exchange")
        start(carrier, flight, timeout)

    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    # The profiler sees no exchange.
    with pytest.MonkeyPatch.context() as patch, profile:
        patch.setattr(Direct, "start", count)
        yield found
    found += [event.name for event in profile.events() if event.name.startswith("gloo:")]


def fail_on(failing, error):
    def work():
        if dist.get_rank() in failing:
            raise error
        return dist.get_rank()

    ranks = Ranks.connect()
    try:
        ranks.agree("weigh the anchor", work, remedy="Pull harder")
    except KeepBestError as raised:
        told = type(raised), str(raised)
    # The failure was no disagreement: they still understand each other.
    assert ranks.gather_json("go on", lambda: ranks.rank) == list(range(ranks.world_size))
    return told


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (ValueError("too heavy"), RankFailedError, "ValueError: too heavy"),
        (ConfigError("too heavy"), ConfigError, "ConfigError: too heavy"),
        (IterationError("ü" * 5000), IterationError, f"IterationError: {'ü' * 5000}"),
        (OSError(28, "disk full"), StorageError, "OSError: [Errno 28] disk full. Pull harder"),
        (RuntimeError(""), RankFailedError, "RuntimeError: "),
        (OtherLibrary.StorageError("too heavy"), RankFailedError, "StorageError: too heavy"),
    ],
    ids=["foreign", "ours", "long", "disk", "without words", "named as ours"],
)
def test_failure_of_one_rank_is_raised_on_every_rank(error, kind, told):
    assert run_ranks(fail_on, 3, [1], error) == [(kind, f"failed to weigh the anchor on rank 1 of 3: {told}")] * 3


def test_failures_of_several_ranks_are_all_told():
    [told, *others] = run_ranks(fail_on, 4, [1, 3], ConfigError("too heavy"))
    assert others == [told] * 3
    assert told[1].endswith("rank 1 of 4: ConfigError: too heavy; rank 3 of 4: ConfigError: too heavy")


def test_failure_that_all_ranks_share_is_not_repeated():
    assert run_ranks(fail_on, 2, [0, 1], ConfigError("too heavy")) == [(ConfigError, "too heavy")] * 2


def fail_beside_a_rank_that_dies():
    ranks = Ranks.connect()
    ranks.agree("meet", lambda: None)
    if ranks.rank == ranks.world_size - 1:
        os._exit(1)
    with pytest.raises(RankLostError) as caught:
        ranks.agree("divide", lambda: 1 / 0)
    return isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("world_size", [2, 3])
def test_own_failure_is_the_cause_where_another_rank_is_lost(world_size):
    with start_ranks(fail_beside_a_rank_that_dies, world_size) as ranks:
        assert all(outcome.result for outcome in ranks.collect(ranks=range(world_size - 1)))


def interrupt_rank_1():
    def work():
        if dist.get_rank() == 1:
            raise KeyboardInterrupt

    try:
        Ranks.connect().agree("weigh the anchor", work)
    except (KeyboardInterrupt, RankFailedError) as raised:
        return type(raised), str(raised)


def test_interrupted_rank_is_interrupted_and_the_others_are_told():
    first, second = run_ranks(interrupt_rank_1, 2)
    assert first == (RankFailedError, "failed to weigh the anchor on rank 1 of 2: KeyboardInterrupt: ")
    assert second[0] is KeyboardInterrupt


def share_values():
    ranks = Ranks.connect()
    assert ranks.agree("own", lambda: ("not", {"json"}, ranks.rank)) == ("not", {"json"}, ranks.rank)
    numbers = ranks.exchange("numbers", Number(float("nan") if ranks.rank else -0.0, None))
    values = ranks.gather_json("values", lambda: {"rank": ranks.rank, "text": "ß" * ranks.rank})
    chosen = ranks.broadcast("choice", lambda: ["of", ranks.rank])
    return repr(numbers), values, chosen, ranks.is_main, ranks.world_size, (ranks.control_group is None)


@pytest.mark.parametrize(("world_size", "init"), [(1, False), (1, True), (2, True), (4, True)])
def test_values_reach_every_rank(world_size, init):
    outcomes = run_ranks(share_values, world_size, init=init)
    for rank, (numbers, values, chosen, is_main, size, alone) in enumerate(outcomes):
        expected = [Number(float("nan") if other else -0.0, None) for other in range(world_size)]
        assert numbers == repr(expected)
        assert values == [{"rank": other, "text": "ß" * other} for other in range(world_size)]
        assert chosen == ["of", 0]
        assert (is_main, size, alone) == (rank == 0, world_size, world_size == 1)


def test_timeouts_and_groups_are_checked():
    for seconds in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="positive number of seconds"):
            Ranks.connect(rank_timeout=seconds)
    with pytest.raises(ConfigError, match="not initialised"):
        Ranks.connect(object())


def keep_in_subgroups(directory):
    """Two subgroups keep runs of their own, one of them with a rank that fails."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = dist.get_rank() % 2
    ranks = Ranks.connect(groups[mine])
    with BestKeeper(
        nn.Linear(1, 1), directory=directory / str(mine), metric_key="loss", process_group=groups[mine]
    ) as keeper:
        outcome = keeper.observe(float(dist.get_rank()), update(1))
    try:
        ranks.agree("split", lambda: 1 / (dist.get_rank() - 3))
        failed = None
    except RankFailedError as error:
        failed = str(error)
    with pytest.raises(ConfigError, match="not a member of the process_group"):
        Ranks.connect(groups[1 - mine])
    return ranks.rank, ranks.world_size, outcome.value, failed


def test_subgroups_keep_runs_of_their_own(tmp_path):
    outcomes = run_ranks(keep_in_subgroups, 4, tmp_path)
    failed = "failed to split on rank 1 of 2: ZeroDivisionError: division by zero"
    assert [outcome[:3] for outcome in outcomes] == [(0, 2, 1.0), (0, 2, 2.0), (1, 2, 1.0), (1, 2, 2.0)]
    assert [outcome[3] is not None and outcome[3].startswith(failed) for outcome in outcomes] == [0, 1, 0, 1]
    for number in range(2):
        assert (tmp_path / str(number) / "checkpoints" / "best_model.loss").is_symlink()


def be_in_another_place(directory, difference):
    rank = dist.get_rank()
    settings = {"tolerances": [1 + rank]} if difference == "settings" else {}
    if difference == "what to do on failures":
        settings = {"on_save_error": ("raise", "warn")[rank]}
    other = BestKeeper(nn.Linear(1, 1), directory=directory / "other", metric_key="loss")
    other.observe(1.0, update(1))

    def train():
        keeper = BestKeeper(nn.Linear(1, 1), directory=directory, metric_key="loss", **settings)
        if difference == "state" and rank == 1:
            keeper.load_state_dict(other.state_dict())
        keeper.observe(1.0, update(1))
        if difference == "close" and rank == 1:
            keeper.close()
        keeper.observe(1.0, update(2 + rank))

    started = time.monotonic()
    with pytest.raises(DesyncError) as caught:
        train()
    assert time.monotonic() - started < 20
    with pytest.raises(PoisonedError, match="not in the same step"):
        Ranks.connect().agree("go on", lambda: None)
    return str(caught.value)


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        ("iteration", ["differ in step 'observe loss'", "iteration=U2", "iteration=U3"]),
        ("settings", ["'check the settings of the keeper of loss'", "tolerances=[1]", "tolerances=[2]"]),
        ("what to do on failures", ["check the settings", "on_save_error='raise'", "on_save_error='warn'"]),
        ("state", ["for best_model.loss'", "loaded=None", "loaded=(best_model.loss of run "]),
        ("close", ["not in the same step", "observe loss", "close best_model.loss"]),
    ],
)  # fmt: skip
def test_ranks_in_different_places_are_told_so_at_once(difference, said, tmp_path):
    outcomes = run_ranks(be_in_another_place, 2, tmp_path, difference)
    assert outcomes == [outcomes[0]] * 2
    lines = outcomes[0].splitlines()
    assert said[0] in lines[0]
    for rank, text in enumerate(said[1:]):
        assert lines[1 + rank].startswith(f"  rank {rank}: {text}")
        assert len(lines[1 + rank]) < 400
    assert "Call the keeper on every rank, in the same order" in lines[-1]


class MuteError(Exception):
    def __str__(self):
        raise ValueError("no text")


def raise_what_cannot_be_shown(directory):
    ranks = Ranks.connect()

    def value():
        if ranks.rank == 1:
            raise MuteError
        return 1.0

    keeper = BestKeeper(nn.Linear(1, 1), directory=directory, metric_key="loss", rank_timeout=20.0)
    with pytest.raises(RankFailedError) as caught:
        keeper.observe(value, update(1))
    keeper.abandon()
    return str(caught.value)


def test_exception_whose_text_raises_is_raised_on_every_rank(tmp_path):
    said = run_ranks(raise_what_cannot_be_shown, 2, tmp_path)
    assert said == [said[0]] * 2
    assert "rank 1 of 2: MuteError: (its message cannot be shown: __str__ raises ValueError)" in said[0]


def differ_late_in_long_settings(directory):
    rank = Ranks.connect().rank
    with pytest.raises(DesyncError) as caught:
        BestKeeper(
            nn.Linear(1, 1),
            directory=directory,
            metric_key="loss",
            tolerances=range(400),
            save_timeout=100.0 + rank % 2,
        )
    return str(caught.value)


def test_of_settings_that_differ_the_difference_alone_is_shown(tmp_path):
    said = run_ranks(differ_late_in_long_settings, 3, tmp_path)
    assert said == [said[0]] * 3
    assert said[0].splitlines()[1:3] == ["  rank 0, 2: save_timeout=100.0", "  rank 1: save_timeout=101.0"]


def observe_until_a_rank_is_gone(directory):
    keeper = BestKeeper(nn.Linear(1, 1), directory=directory, metric_key="loss", rank_timeout=2.0)
    keeper.observe(1.0, update(1))
    pause("ready")
    started = time.monotonic()
    try:
        keeper.observe(2.0, update(2))
        keeper.observe(2.0, update(3))
    except KeepBestError as error:
        told = type(error), str(error), time.monotonic() - started
    with pytest.raises(PoisonedError):
        keeper.close()
    announce("told")
    return told


def test_stopped_rank_is_named_when_the_time_is_up(tmp_path):
    with start_ranks(observe_until_a_rank_is_gone, 3, tmp_path) as ranks:
        for rank in range(3):
            ranks.wait_for(rank, "ready")
        ranks.signal(1, signal.SIGSTOP)
        for rank in range(3):
            ranks.resume(rank)
        outcomes = ranks.collect(ranks=[0, 2])
    for outcome in outcomes:
        kind, message, waited = outcome.result
        assert kind is RankTimeoutError
        assert "waited 2 s in step 'observe loss'; ranks that did not arrive: 1." in message
        assert 2 <= waited < 20


def test_killed_rank_is_noticed_long_before_the_time_is_up(tmp_path):
    with start_ranks(observe_until_killed, 3, tmp_path) as ranks:
        for rank in range(3):
            ranks.wait_for(rank, "ready")
        ranks.signal(1, signal.SIGKILL)
        ranks.processes[1].join()
        for rank in (0, 2):
            ranks.resume(rank)
        outcomes = ranks.collect(timeout=30, ranks=[0, 2])
    for outcome in outcomes:
        assert isinstance(outcome.exception, RankFailedError)
        assert "lost contact with another rank in step 'observe loss'" in str(outcome.exception)


def observe_until_killed(directory):
    keeper = BestKeeper(nn.Linear(1, 1), directory=directory, metric_key="loss")
    keeper.observe(1.0, update(1))
    pause("ready")
    keeper.observe(2.0, update(2))
    keeper.observe(2.0, update(3))


def fail_in_the_gather(directory):
    with pytest.MonkeyPatch.context() as patch:
        return fail_where_rank_0_has_no_room(directory, patch)


def fail_where_rank_0_has_no_room(directory, monkeypatch):
    def refuse(slot, key, value):
        raise MemoryError("no memory for the weights")

    model = nn.Linear(1, 1)
    if dist.get_rank() == 0:
        monkeypatch.setattr(LiveSlot, "put", refuse)
    keeper = BestKeeper(model, directory=directory, metric_key="loss", rank_timeout=2.0, save_timeout=2.0)
    try:
        keeper.observe(1.0, update(1))
    except KeepBestError as error:
        told = type(error), str(error)
    with pytest.raises(PoisonedError):
        keeper.observe(1.0, update(2))
    with pytest.raises(PoisonedError):
        keeper.close()
    return told


def test_rank_that_fails_in_the_gather_runs_no_more_collectives(tmp_path):
    first, second = run_ranks(fail_in_the_gather, 2, tmp_path)
    assert first == (
        RankFailedError,
        "rank 0 of 2 failed to gather the weights: MemoryError: no memory for the weights",
    )
    assert second[0] is RankTimeoutError
    assert "in step 'save the new best of loss at U1'; ranks that did not arrive: 0." in second[1]


def count_collectives(directory):
    """Collectives of quiet intervals, of one that closes two tolerances, and of a new best."""
    keeper = BestKeeper(nn.Linear(1, 1), directory=directory, metric_key="loss", tolerances=[1, 2])
    keeper.observe(1.0, update(1))
    counts = []
    for number, value in enumerate([2.0, float("nan"), 1.0, 1.0], start=2):
        with counted_collectives() as found:
            outcome = keeper.observe(value, update(number))
        counts.append((outcome.newly_exceeded, found))
    keeper.close()
    return counts


def test_interval_without_a_new_best_costs_one_exchange(tmp_path):
    for counts in run_ranks(count_collectives, 2, tmp_path):
        assert counts == [(newly, ["exchange"]) for newly in ((), (1,), (2,), ())]

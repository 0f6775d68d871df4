"""Threads that use the keepers of one run: they take turns, and the run is what one thread would have made."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

import pytest
from torch import nn

from keepbest import BestKeeper
from keepbest.errors import IterationError
from keepbest.run.verify import verify
from tests.kit.runs import ledger, refs

EACH, THREADS = 12, 4


def on_threads(work: Callable[[int], None]) -> list[BaseException]:
    """What was raised by threads that work at the same time; each gets its number."""
    raised, ready = [], threading.Barrier(THREADS)

    def run(number: int) -> None:
        ready.wait()
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001  # judged by the test
            raised.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.mark.parametrize("settings", [{}, {"async_save": True}, {"format": "dcp"}], ids=["waits", "background", "dcp"])
def test_keepers_of_several_threads_share_one_whole_ledger(settings, tmp_path):
    model = nn.Linear(8, 8)
    keepers = [BestKeeper(model, directory=tmp_path, metric_key=f"loss/{name}", **settings) for name in "abcd"]
    for keeper in keepers:
        keeper.start()

    def train(number: int) -> None:
        with keepers[number] as keeper:
            for epoch in range(1, EACH + 1):
                assert keeper.observe(1.0 / epoch, epoch=epoch).is_new_best

    assert on_threads(train) == []
    assert verify(tmp_path) == []
    bests = refs(tmp_path)
    assert bests.keys() == {f"best_model.loss.{name}" for name in "abcd"}
    assert {snapshot.partition(".")[0] for snapshot in bests.values()} == {f"E{EACH}"}


@pytest.mark.parametrize("in_background", [False, True])
def test_one_keeper_on_several_threads_records_in_order(in_background, tmp_path):
    keeper, accepted = BestKeeper(nn.Linear(8, 8), directory=tmp_path, metric_key="loss", async_save=in_background), []

    def train(number: int) -> None:
        for update in range(number, number + EACH * THREADS, THREADS):
            # Another thread may have been at a later one.
            with suppress(IterationError):
                accepted.append(keeper.observe(-float(update), update=update).iteration)

    assert on_threads(train) == []
    keeper.close()
    assert verify(tmp_path) == []
    lines = [line["iteration"] for line in ledger(tmp_path) if line["event"] == "observation"]
    assert lines == sorted(map(str, accepted), key=lambda name: int(name[1:]))
    assert refs(tmp_path) == {"best_model.loss": lines[-1]}


def test_best_is_restored_after_the_save_of_another_thread(tmp_path):
    model, has_waited = nn.Linear(8, 8), []
    first = BestKeeper(model, directory=tmp_path / "run", metric_key="loss/first")
    thread = threading.Thread(target=first.restore_best)

    def restore_meanwhile(*_):
        thread.start()
        thread.join(1.0)
        has_waited.append(thread.is_alive())

    with BestKeeper(
        model, directory=tmp_path / "run", metric_key="loss/second", on_new_best=restore_meanwhile
    ) as second:
        with first:
            first.observe(1.0, epoch=1)
        second.observe(1.0, epoch=1)
        thread.join()
    assert has_waited == [True]


def test_hook_uses_its_keeper_on_its_own_thread(tmp_path):
    keeper = BestKeeper(nn.Linear(8, 8), directory=tmp_path, metric_key="loss", on_new_best=lambda *_: keeper.flush())
    assert on_threads(lambda _: keeper.start()) == []
    keeper.observe(1.0, epoch=1)
    keeper.close()
    assert verify(tmp_path) == []

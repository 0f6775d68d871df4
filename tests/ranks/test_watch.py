"""A rank that waits for long says for whom, and what it waits for does not depend on who watches."""

from __future__ import annotations

import gc
import logging
import threading
import time

import pytest
import torch.distributed as dist

from keepbest.ranks import Number, Ranks, attendance, watch
from tests.kit.child import announce, pause
from tests.kit.pool import run_ranks, start_ranks


class Announcer(logging.Handler):
    """Lets the test have the step and the names of each line."""

    def emit(self, record):
        announce("waits in {3} for {4}".format(*record.args))


def come_late(late: list[int]) -> None:
    watch._LONG, watch._LOOK, attendance._GRACE_PERIOD = 0.2, 0.05, 1.2
    logging.getLogger("keepbest.ranks.watch").addHandler(Announcer())
    ranks = Ranks.connect(rank_timeout=60.0)
    for step in ("first", "second"):
        if ranks.rank in late:
            pause(step)
        ranks.exchange(step, Number(0.0, None))


@pytest.mark.parametrize(("world_size", "late", "names"), [(2, [0], "0"), (2, [1], "1"), (4, [1, 3], "1, 3")], ids=str)
def test_rank_that_waits_for_long_logs_for_whom(world_size, late, names):
    lowest = next(rank for rank in range(world_size) if rank not in late)
    with start_ranks(come_late, world_size, late) as ranks:
        ranks.wait_for(lowest, f"waits in first for {names}")
        for step in ("first", "second"):
            for rank in late:
                ranks.wait_for(rank, step)
                ranks.resume(rank)
        ranks.collect()
        lines = [[text for text in events if text.startswith("waits")] for events in ranks._events]
    # Once, since the second wait is no longer, and by one of those that wait.
    assert [len(each) for each in lines] == [int(rank == lowest) for rank in range(world_size)]


def watch_without_waiting() -> int:
    """The number of threads that watch a group that is gone."""
    watch._LOOK = 0.05
    Ranks.connect().agree("meet", lambda: None)
    assert sum(thread.name == "keepbest-watch" for thread in threading.enumerate()) == 1
    dist.destroy_process_group()
    gc.collect()
    deadline = time.monotonic() + 5.0
    while (left := sum(thread.name == "keepbest-watch" for thread in threading.enumerate())) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.02)  # nothing reports that a thread has ended
    return left


def test_watch_ends_with_the_group_that_it_watches():
    assert run_ranks(watch_without_waiting, 2) == [0, 0]

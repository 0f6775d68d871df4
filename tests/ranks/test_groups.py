"""The gloo groups of a process group: they meet wherever it is, and go when it does."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from keepbest import BestKeeper, load
from keepbest.errors import PoisonedError, RankFailedError
from keepbest.ranks import Ranks
from tests.kit.child import in_forked_child
from tests.kit.pool import run_ranks, start_ranks
from tests.kit.runs import refs, update


def native_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def keep(directory: Path, model: nn.Module, group: dist.ProcessGroup) -> None:
    # `dcp` makes the ranks exchange plans, for which they have a second group.
    with BestKeeper(model, directory=directory, metric_key="loss", process_group=group, format="dcp") as keeper:
        keeper.observe(1.0, update(1))


def threads_after_each_group(directory: Path) -> list[int]:
    torch.manual_seed(0)
    model, seen = nn.Linear(1, 1), []
    dist.new_group([0, 2])  # ranks 0 and 1 are in different numbers of groups from now on
    for number in range(3):
        group = dist.new_group([0, 1])
        if dist.get_rank() < 2:
            keep(directory / str(number), model, group)
            dist.destroy_process_group(group)
        del group
        seen.append(native_threads() - threading.active_count())
    return seen


def test_groups_of_a_destroyed_group_are_released(tmp_path):
    for seen in run_ranks(threads_after_each_group, 3, tmp_path):
        assert len(set(seen)) == 1
    assert refs(tmp_path / "2") == {"best_model.loss": "U1"}


def kept_in_two_worlds(directory: Path) -> int:
    torch.manual_seed(0)
    model, rank, world_size = nn.Linear(1, 1), dist.get_rank(), dist.get_world_size()
    keep(directory / "first", model, dist.group.WORLD)
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world_size)
    keep(directory / "second", model, dist.group.WORLD)
    return world_size


def test_keeper_works_in_a_second_world_of_the_process(tmp_path):
    assert run_ranks(kept_in_two_worlds, 2, tmp_path) == [2, 2]
    assert refs(tmp_path / "second") == {"best_model.loss": "U1"}


def use_in_a_forked_child(directory: Path) -> int:
    torch.manual_seed(0)
    keep(directory, model := nn.Linear(1, 1), dist.group.WORLD)
    late = BestKeeper(model, directory=directory / "late", metric_key="loss")

    def use() -> None:
        load(directory, "best_model.loss", model)
        with pytest.raises(PoisonedError, match="was forked from process"):
            late.start()

    status = in_forked_child(use)
    late.start()
    late.close()
    return status


def test_forked_child_loads_alone_and_disturbs_no_rank(tmp_path):
    assert run_ranks(use_in_a_forked_child, 2, tmp_path) == [0, 0]


def lose_a_rank_in_a_broadcast() -> str:
    ranks = Ranks.connect()
    ranks.gather_json("meet", lambda: None)
    if ranks.rank == 1:
        os._exit(1)
    with pytest.raises((RuntimeError, ValueError)) as failed:
        dist.broadcast(torch.zeros(1), group=ranks.control_group, group_src=1)
    with pytest.raises(RankFailedError) as caught:
        ranks.lose("bring the weights", failed.value)
    return str(caught.value)


def test_log_of_torch_does_not_hide_that_a_rank_was_lost():
    with start_ranks(lose_a_rank_in_a_broadcast, 2) as ranks:
        [outcome] = ranks.collect(ranks=[0])
    assert "failed to bring the weights: RuntimeError" in outcome.result

"""How ranks find each other: what is raised, or warned of, where one of them is not there or works alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import nn

from keepbest import BestKeeper
from keepbest.errors import ConfigError, RankTimeoutError
from tests.kit.pool import run_ranks


def create_on_rank_0_alone(directory: Path) -> str:
    rank = dist.get_rank()
    message = ""
    if rank == 0:
        with pytest.raises(RankTimeoutError) as caught:
            BestKeeper(nn.Linear(1, 1), directory=directory, metric_key="loss", rank_timeout=0.5)
        message = str(caught.value)
    dist.barrier()
    return message


@pytest.mark.parametrize(("world_size", "absent"), [(2, "1"), (3, "1, 2")])
def test_keeper_on_rank_0_alone_names_the_absent_ranks(world_size, absent, tmp_path):
    message, *_ = run_ranks(create_on_rank_0_alone, world_size, tmp_path)
    assert f"rank 0 of {world_size} waited 0.5 s to connect" in message
    assert f"ranks that did not arrive: {absent}. Create a keeper, or call load, on every rank" in message
    assert list(tmp_path.iterdir()) == []


def create_too_early(rendezvous: Path, directory: Path) -> str:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    keeper = BestKeeper(nn.Linear(1, 1), directory=directory, metric_key="loss")
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    with pytest.raises(ConfigError) as caught, keeper:
        keeper.observe(1.0 + rank, epoch=1)
    return str(caught.value)


def number_ranks(place: Path, *arguments: Path) -> str:
    # Where nothing is initialised, the pool says no rank: the first to come takes the first number.
    number = next(each for each in range(2) if take(place / str(each)))
    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2"}
    return create_too_early(*arguments)


def take(place: Path) -> bool:
    try:
        place.mkdir()
    except FileExistsError:
        return False
    return True


def test_keeper_from_before_init_process_group_is_refused(tmp_path):
    messages = run_ranks(number_ranks, 2, tmp_path, tmp_path / "store", tmp_path / "run", init=False)
    assert sorted(message.partition("so that ")[2][:11] for message in messages) == ["rank 0 of 2", "rank 1 of 2"]
    assert all("create it after init_process_group(), on every rank" in message for message in messages)
    assert not (tmp_path / "run").exists()


def test_process_of_several_without_a_group_is_warned_of(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with BestKeeper(nn.Linear(1, 1), directory=tmp_path, metric_key="loss") as keeper:
        keeper.observe(1.0, epoch=1)
    assert "RANK is 1 and WORLD_SIZE is 2, but torch.distributed is not initialised" in caplog.text
    assert keeper.best_metric_value == 1.0


def test_single_process_of_torchrun_is_not_warned_of(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with BestKeeper(nn.Linear(1, 1), directory=tmp_path, metric_key="loss") as keeper:
        keeper.observe(1.0, epoch=1)
    assert "WORLD_SIZE" not in caplog.text

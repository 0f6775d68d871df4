"""Training states of which each rank has its own."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from keepbest import BestKeeper, PerRank, RandomState, load
from keepbest.errors import SnapshotError
from tests.kit.pool import run_ranks
from tests.kit.runs import update
from tests.training_state.loop import BEST
from tests.training_state.test_saving import Counter


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def seed(number):
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def same_model():
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.fill_(1.0)
    return model


def keep(directory, settings):
    """What this rank draws after the best."""
    rank, model = dist.get_rank(), same_model()
    seed(rank)
    states = {"random": RandomState(), "loader": PerRank(Counter(10 + rank)), "same": Counter(7)}
    with BestKeeper(model, directory=directory, metric_key="loss", training_state=states, **settings) as keeper:
        draw()
        keeper.observe(1.0, update(1))
        return draw()


def resume(directory):
    """What this rank draws after the load, and what it is warned of."""
    seed(99)
    warned = []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())
    logging.getLogger("keepbest").addHandler(handler)
    loader, same = Counter(-1), Counter()
    states = {"random": RandomState(), "loader": PerRank(loader), "same": same}
    load(directory, BEST, same_model(), training_state=states)
    return draw(), loader.value, same.value, warned


@pytest.mark.parametrize("settings", [{}, {"format": "safetensors", "async_save": True}, {"format": "dcp"}], ids=str)
def test_each_rank_continues_with_its_own_state(settings, tmp_path):
    kept = run_ranks(keep, 2, tmp_path, settings)
    assert kept[0] != kept[1]
    first, second, third = run_ranks(resume, 3, tmp_path)
    assert [first, second] == [(kept[0], 10, 7, []), (kept[1], 11, 7, [])]
    seed(99)
    same_model()
    assert third == (
        draw(),
        -1,
        7,
        [
            "rank 2 keeps its own random: it was saved on 2 ranks",
            "rank 2 keeps its own loader: it was saved on 2 ranks",
        ],
    )


def test_state_of_one_rank_is_not_taken_for_that_of_all(tmp_path):
    model = nn.Linear(1, 1)
    states = {"a": PerRank(Counter(1)), "b": Counter(2)}
    with BestKeeper(model, directory=tmp_path, metric_key="loss", training_state=states) as keeper:
        keeper.observe(1.0, update(1))
    with pytest.raises(SnapshotError, match="'a': it was saved as one for each rank: use PerRank"):
        load(tmp_path, BEST, model, training_state={"a": Counter()})
    with pytest.raises(SnapshotError, match="'b': it was saved as one for all ranks: pass it without PerRank"):
        load(tmp_path, BEST, model, training_state={"b": PerRank(Counter())})

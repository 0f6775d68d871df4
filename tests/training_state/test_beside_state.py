"""Optimizers whose state dict has more than the groups and the state of parameters."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer

from keepbest import BestKeeper, load
from keepbest.errors import ConfigError, SnapshotError
from tests.kit.pool import run_ranks
from tests.kit.runs import update
from tests.kit.strategies import ddp, fsdp1, fsdp2, single
from tests.training_state.loop import BEST, Training, differing, whole

FORMATS = [{}, {"format": "dcp", "async_save": True}]


class EverySecond(torch.optim.SGD):
    """Takes every second step only, and counts them."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.05, momentum=0.9)
        self.count, self.more = 1, {}

    def step(self, closure=None):
        self.count += 1
        if self.count % 3:
            super().step(closure)

    def state_dict(self):
        return {**super().state_dict(), "count": self.count, **self.more}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]
        super().load_state_dict(state_dict)


def make(model):
    return EverySecond(each for each in model.parameters() if each.requires_grad)


def continue_counting(directory, wrap):
    """What differs after a resume."""
    found = []
    for number, settings in enumerate(FORMATS):
        uninterrupted = Training(wrap, make).keep(directory / str(number), **settings)
        again = Training(wrap, make, seed=2)
        found += differing(again.resume(directory / str(number)), uninterrupted) or [again.optimizer.count]
    return found


def test_count_of_the_optimizer_comes_back(tmp_path):
    assert continue_counting(tmp_path, single) == [6, 6]


@pytest.mark.parametrize("wrap", [ddp, fsdp1, fsdp2])
def test_count_of_the_optimizer_comes_back_on_ranks(wrap, tmp_path):
    assert run_ranks(continue_counting, 2, tmp_path, wrap) == [[6, 6], [6, 6]]


def keep_more(directory):
    training = Training(fsdp2, make)
    training.optimizer.more = {"norms": [torch.ones(2)]}
    with pytest.raises(ConfigError, match=r"state_dict\(\) of the optimizer has 'norms'\[0\] beside the state of its"):
        BestKeeper(training.model, directory=directory, metric_key="loss", training_state=training.state).start()


def test_rows_beside_sharded_parameters_are_refused(tmp_path):
    run_ranks(keep_more, 2, tmp_path)


def keep_stages(directory):
    stage = nn.ModuleDict({str(dist.get_rank()): nn.Linear(2, 2)})
    optimizer = make(stage)
    optimizer.count += dist.get_rank()
    states = {"it": optimizer}
    with BestKeeper(stage, directory=directory, metric_key="loss", training_state=states) as keeper:
        keeper.observe(1.0, update(1))
    optimizer.count = 0
    load(directory, BEST, stage, training_state=states)
    return optimizer.count


def test_stages_have_counts_of_their_own(tmp_path):
    assert run_ranks(keep_stages, 2, tmp_path) == [1, 2]
    whole = nn.ModuleDict({"0": nn.Linear(2, 2), "1": nn.Linear(2, 2)})
    with pytest.raises(SnapshotError, match="count of its state dict was saved with different values by several ranks"):
        load(tmp_path, BEST, whole, training_state={"it": make(whole)})


def local_sgd(model):
    inside = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return PostLocalSGDOptimizer(inside, PeriodicModelAverager(period=4, warmup_steps=2))


def continue_local_sgd(directory):
    model, again = (ddp(nn.Linear(2, 2)) for _ in range(2))
    optimizer, other = local_sgd(model), local_sgd(again)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with BestKeeper(model, directory=directory, metric_key="loss", training_state={"it": optimizer}) as keeper:
        keeper.observe(1.0, update(1))
    load(directory, BEST, again, training_state={"it": other})
    return optimizer.averager.step, other.averager.step, whole(other.state_dict()) == whole(optimizer.state_dict())


def test_post_local_sgd_counts_from_where_it_was(tmp_path):
    assert run_ranks(continue_local_sgd, 2, tmp_path) == [(1, 1, True)] * 2


class Within(torch.optim.SGD):
    """Has its state within a state dict of its own, as some that wrap an optimizer do."""

    def state_dict(self):
        return {"base": super().state_dict(), "rho": 0.05}


@pytest.mark.parametrize("wrap", [single, fsdp1])
def test_state_dict_of_another_form_is_refused_at_start(wrap, tmp_path):
    run_ranks(keep_within, 2 if wrap is fsdp1 else 1, tmp_path, wrap)
    assert not list(tmp_path.rglob("ledger.jsonl"))


def keep_within(directory, wrap):
    model = wrap(nn.Linear(2, 2))
    states = {"it": Within(model.parameters(), lr=0.1)}
    reason = r"training_state 'it': state_dict\(\) of a Within has 'base', 'rho', and not 'state'.*leave it out of trai"
    with pytest.raises(ConfigError, match=reason):
        BestKeeper(model, directory=directory, metric_key="loss", training_state=states).start()


class Quantized(torch.Tensor):
    pass


class InFewBits(torch.optim.SGD):
    """Keeps its momentum in a class of tensors of its own, as optimizers of 8 bits do."""

    def step(self, closure=None):
        super().step(closure)
        for state in self.state.values():
            state["momentum_buffer"] = state["momentum_buffer"].as_subclass(Quantized)


def test_class_of_tensors_in_a_state_names_its_way_out(tmp_path):
    model = nn.Linear(2, 2)
    optimizer = InFewBits(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    keeper = BestKeeper(model, directory=tmp_path, metric_key="loss", training_state={"it": optimizer})
    with pytest.raises(
        ConfigError, match=r"weight/momentum_buffer of it' is a .*Quantized.*out of training_state"
    ) as it:
        keeper.start()
    assert "model_names" not in str(it.value)

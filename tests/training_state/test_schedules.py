"""Schedules of another kind, or of another number, than what was saved."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from keepbest import BestKeeper, load
from keepbest.errors import SnapshotError
from tests.kit.runs import update
from tests.training_state.loop import BEST


class Halved(StepLR):
    """A schedule of the user's, which is one of torch."""


class Own(torch.optim.lr_scheduler.LRScheduler):
    """A schedule of the user's alone."""

    def get_lr(self):
        return [0.5 for _ in self.base_lrs]


class Wrapped:
    """As Accelerate wraps a schedule."""

    def __init__(self, scheduler):
        self.scheduler = scheduler

    def state_dict(self):
        return self.scheduler.state_dict()

    def load_state_dict(self, state_dict):
        self.scheduler.load_state_dict(state_dict)


class Plain:
    """What saves the state of a schedule as that of any object, as older checkpoints have it."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state_dict):
        self.state = state_dict


def made(make, *, groups=1):
    model = nn.Linear(2, 2)
    weights = [[model.weight], [model.bias]] if groups == 2 else [[model.weight, model.bias]]
    optimizer = torch.optim.SGD([{"params": each} for each in weights], lr=1.0)
    return model, make(optimizer)


def saved(directory, model, schedule, **settings):
    states = {"schedule": schedule}
    with BestKeeper(model, directory=directory, metric_key="loss", training_state=states, **settings) as keeper:
        keeper.observe(1.0, update(1))


steps, cosine = partial(StepLR, step_size=1), partial(CosineAnnealingLR, T_max=5)


def several(kind, *inside):
    def make(optimizer):
        schedules = [make_one(optimizer) for make_one in inside]
        more = {} if kind is ChainedScheduler else {"milestones": list(range(2, len(inside) + 1))}
        return kind(schedules, **more) if kind is ChainedScheduler else kind(optimizer, schedules, **more)

    return make


OTHERS = [
    (steps, cosine, "it was saved from 'StepLR', and is to be loaded into 'CosineAnnealingLR'"),
    (cosine, steps, "it was saved from 'CosineAnnealingLR', and is to be loaded into 'StepLR'"),
    (steps, partial(ReduceLROnPlateau), "saved from 'StepLR', .* into 'ReduceLROnPlateau'"),
    (Own, steps, "saved from 'Own', .* into 'StepLR'"),
    (lambda optimizer: Wrapped(steps(optimizer)), cosine, "saved from 'StepLR', .* into 'CosineAnnealingLR'"),
    (partial(ExponentialLR, gamma=0.5), partial(ConstantLR), "saved from 'ExponentialLR', .* into 'ConstantLR'"),
    (
        several(SequentialLR, LinearLR, cosine),
        several(SequentialLR, LinearLR, steps),
        r"saved from 'SequentialLR\(LinearLR, CosineAnnealingLR\)', .* into 'SequentialLR\(LinearLR, StepLR\)'",
    ),
    (
        several(ChainedScheduler, LinearLR),
        several(ChainedScheduler, LinearLR, steps),
        r"saved from 'ChainedScheduler\(LinearLR\)', .* into 'ChainedScheduler\(LinearLR, StepLR\)'",
    ),
]


@pytest.mark.parametrize(("before", "after", "message"), OTHERS)
def test_state_of_another_schedule_is_not_loaded(before, after, message, tmp_path):
    saved(tmp_path, *made(before))
    model, schedule = made(after)
    weight, state = model.weight.tolist(), schedule.state_dict()
    with pytest.raises(SnapshotError, match=f"'schedule': .*{message}.* Nothing was loaded"):
        load(tmp_path, BEST, model, training_state={"schedule": schedule})
    assert (model.weight.tolist(), schedule.state_dict()) == (weight, state)


def test_schedule_of_another_number_of_groups_is_refused(tmp_path):
    saved(tmp_path, *made(steps))
    model, schedule = made(steps, groups=2)
    with pytest.raises(SnapshotError, match="the number of its groups of parameters is 2, and was 1 when it was saved"):
        load(tmp_path, BEST, model, training_state={"schedule": schedule})


def test_older_state_of_fewer_schedules_is_refused(tmp_path):
    model, schedule = made(several(SequentialLR, LinearLR, steps))
    saved(tmp_path, model, Plain(schedule.state_dict()))
    model, schedule = made(several(SequentialLR, LinearLR, steps, cosine))
    with pytest.raises(SnapshotError, match="the number of its schedules is 3, and was 2 when it was saved"):
        load(tmp_path, BEST, model, training_state={"schedule": schedule})


class OfOwnNames(StepLR):
    """Has a name of torch's for something else."""

    def __init__(self, optimizer, **settings):
        self._schedulers = None
        super().__init__(optimizer, step_size=7, **settings)


halved = partial(Halved, step_size=7)
SAME = [
    (steps, halved),
    (halved, steps),
    (OfOwnNames, OfOwnNames),
    (steps, lambda optimizer, **more: Wrapped(steps(optimizer, **more))),
    (lambda optimizer: Plain(steps(optimizer).state_dict()), steps),
    (partial(LambdaLR, lr_lambda=lambda _: 0.5), partial(LambdaLR, lr_lambda=lambda _: 0.25)),
]


@pytest.mark.parametrize("kind", ["torch", "dcp", "safetensors"])
@pytest.mark.parametrize(("before", "after"), SAME)
def test_schedule_of_the_same_kind_continues(before, after, kind, tmp_path):
    model, schedule = made(before)
    saved(tmp_path, model, schedule, format=kind)
    again, other = made(after)
    load(tmp_path, BEST, again, training_state={"schedule": other})
    found, expected = other.state_dict(), schedule.state_dict()
    assert {key: found[key] for key in expected if key != "lr_lambdas"} == {
        key: value for key, value in expected.items() if key != "lr_lambdas"
    }

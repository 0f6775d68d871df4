"""Where tensors are made by default is the business of the user. A default that holds no values stands for a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from keepbest import BestKeeper, RandomState, load
from tests.kit.models import odd, same_bits
from tests.kit.pool import run_ranks
from tests.kit.runs import set_weights, update
from tests.kit.strategies import WRAPS, whole_weights


class Stage(nn.Linear):
    """Has a state of its own."""

    def __init__(self):
        super().__init__(2, 2)
        self.state = {}
        set_weights(self, float(dist.get_rank()))

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


def stage():
    """Ranks that hold other names, as the stages of a pipeline do."""
    rank = dist.get_rank()
    model = nn.ModuleDict({str(rank): Stage()})
    model[str(rank)].state = {"seen": torch.tensor([rank]), "empty": torch.zeros(0)}
    return model


def of_wrap(name):
    return stage() if name == "stages" else WRAPS[name](odd(0))


def keep_and_load(directory, name, settings):
    model, other = of_wrap(name), of_wrap(name)
    expected = whole_weights(stage() if name == "stages" else odd(0))
    for tensor in (*other.parameters(), *other.buffers()):
        tensor.detach().zero_()
    random = {} if settings["format"] == "safetensors" else {"training_state": {"random": RandomState()}}
    torch.set_default_device("meta")
    try:
        with BestKeeper(model, directory=directory, metric_key="loss", **settings, **random) as keeper:
            for number in (1, 2):
                keeper.observe(1.0 / number, update(number))
        load(directory, "best_model.loss", other, **random)
    finally:
        torch.set_default_device(None)
    return list(map(same_bits, whole_weights(other), expected))


@pytest.mark.parametrize(
    "settings",
    [
        {"format": "torch", "async_save": False},
        {"format": "torch", "async_save": True},
        {"format": "safetensors", "async_save": True},
        {"format": "dcp", "async_save": True},
    ],
    ids=lambda settings: f"{settings['format']}-{settings['async_save']}",
)
@pytest.mark.parametrize("name", ["ddp", "fsdp2_blocks", "fsdp1_nested", "tensor_parallel", "stages"])
def test_default_device_does_not_matter(name, settings, tmp_path):
    if (name, settings["format"]) == ("stages", "safetensors"):
        pytest.skip("a file of safetensors has no room for the state")
    for equal in run_ranks(keep_and_load, 2, tmp_path, name, settings, timeout=30):
        assert equal == [True] * (2 if name == "stages" else 12)

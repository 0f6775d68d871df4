"""Values that were kept under several names, and are for one tensor where they are loaded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from keepbest import BestKeeper, load
from keepbest.errors import SnapshotError
from tests.kit.models import same_bits
from tests.kit.pool import run_ranks
from tests.kit.runs import update
from tests.kit.strategies import WRAPS, whole_weights


class Pair(nn.Module):
    def __init__(self, seed, is_tied):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        if is_tied:
            self.second.weight = self.first.weight

    def forward(self, batch):
        return self.second(self.first(batch))


def load_into_tied(directory, wrap, settings):
    """What is refused of different values, and whether equal ones are loaded."""
    model = WRAPS[wrap](Pair(1, is_tied=False))
    with BestKeeper(model, directory=directory, metric_key="loss", **settings) as keeper:
        keeper.observe(1.0, update(1))
    tied = WRAPS[wrap](Pair(2, is_tied=True))
    before = whole_weights(tied)
    with pytest.raises(SnapshotError) as caught:
        load(directory, "best_model.loss", tied)
    assert all(map(same_bits, whole_weights(tied), before))
    load(directory, "best_model.loss", tied, only="first")
    found = [same_bits(whole_weights(tied)[0], whole_weights(model)[0])]
    equal = Pair(3, is_tied=False)
    equal.second.load_state_dict(equal.first.state_dict())
    with BestKeeper(WRAPS[wrap](equal), directory=directory / "equal", metric_key="loss", **settings) as keeper:
        keeper.observe(1.0, update(1))
    load(directory / "equal", "best_model.loss", tied)
    found.append(same_bits(whole_weights(tied)[0], Pair(3, is_tied=True).first.weight))
    return str(caught.value), found


def count_exchanges(directory, layers):
    """What a load costs where each of so many layers is tied to one that was saved beside it."""
    model = nn.ModuleList([Pair(1, is_tied=False) for _ in range(layers)])
    for pair in model:
        pair.second.load_state_dict(pair.first.state_dict())
    with BestKeeper(WRAPS["ddp"](model), directory=directory, metric_key="loss", format="dcp") as keeper:
        keeper.observe(1.0, update(1))
    for pair in model:
        pair.second.weight = pair.first.weight
    before = keeper._ranks._control.round
    keeper.restore_best()
    return keeper._ranks._control.round - before


def test_ties_are_compared_in_one_exchange(tmp_path):
    [one], [several] = (set(run_ranks(count_exchanges, 2, tmp_path / str(layers), layers)) for layers in (1, 5))
    assert one == several


@pytest.mark.parametrize("wrap", ["ddp", "fsdp1", "fsdp2"])
@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"format": "torch"}, "first.weight and second.weight"),
        ({"format": "dcp"}, "first.weight and second.weight"),
        ({"format": "safetensors", "model_names": ["second", "first"]}, "second.weight and first.weight"),
    ],
)
def test_different_values_are_not_loaded_into_a_tied_weight(wrap, settings, names, tmp_path):
    for message, found in run_ranks(load_into_tied, 2, tmp_path, wrap, settings):
        assert f"{names} have different values there, and are one tensor in the model" in message
        assert found == [True, True]

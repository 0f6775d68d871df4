"""A model whose weights get other names after the keeper has started."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from keepbest import BestKeeper, load
from keepbest.errors import ConfigError
from tests.kit.pool import run_ranks
from tests.kit.runs import set_weights, update


def layers():
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(2)))
    set_weights(model, 1.0)
    return model


class Adapter(nn.Module):
    """As LoRA has it: the layer that it adapts gets another name."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.down = inner, nn.Linear(8, 1, bias=False)
        set_weights(self.down, 0.5)


def adapt(model):
    model[1] = Adapter(model[1])


def parametrize_weight(model):
    weight_norm(model[1])


def append(model):
    model.append(nn.Linear(8, 1, bias=False))
    set_weights(model[2], 3.0)


def change_on(directory, change, ranks):
    """What a best of the changed model loads into it, by name; or the error."""
    model = layers()
    with BestKeeper(model, directory=directory, metric_key="loss") as keeper:
        keeper.observe(2.0, update(1))
        if dist.get_rank() in ranks:
            change(model)
        try:
            keeper.observe(1.0, update(2))
        except ConfigError as error:
            return str(error)
    set_weights(model, 9.0)
    load(directory, "best_model.loss", model)
    return {name: value.flatten()[0].item() for name, value in model.state_dict().items()}


def change_on_all_then_on_one(directory, change):
    return change_on(directory / "all", change, [0, 1]), change_on(directory / "one", change, [1])


NORM, DIRECTION = (f"1.parametrizations.weight.original{number}" for number in range(2))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (adapt, {"1.inner.weight": 1.0, "1.down.weight": 0.5}),
        (parametrize_weight, {NORM: 8**0.5, DIRECTION: 1.0}),
        (append, {"1.weight": 1.0, "2.weight": 3.0}),
    ],
)
def test_change_of_names_is_kept_on_all_ranks_and_refused_on_one(change, names, tmp_path):
    for kept, refused in run_ranks(change_on_all_then_on_one, 2, tmp_path, change):
        assert kept == pytest.approx({"0.weight": 1.0, **names})
        assert "the ranks had the same parameters, and now some have others" in refused
        assert all(f"'{name}' on rank 1" in refused for name in names if name != "1.weight")
        assert "Since the keeper started this has changed: on rank 1: '" in refused

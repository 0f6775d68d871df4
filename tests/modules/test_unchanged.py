"""A model is unchanged only where its state dict would have the same tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from keepbest.modules.unchanged import Structure
from tests.kit.changes import CHANGES, Doubled, Stateful, model_of, swap_in_a_nested_tensor


@pytest.mark.parametrize("change", [*CHANGES, swap_in_a_nested_tensor])
def test_change_is_noticed(change):
    model = model_of()
    values = model.state_dict(keep_vars=True).values()
    structure = Structure.of(model, values, with_grad=True)
    assert structure.is_unchanged()
    change(model)
    assert not structure.is_unchanged()


def patch_state_dict_of_the_class(patch, model):
    patch.setattr(nn.Linear, "state_dict", lambda *_args, destination, **_kwargs: destination, raising=False)


def patch_state_dict_of_all(patch, model):
    patch.setattr(nn.Module, "state_dict", lambda *_args, destination=None, **_kwargs: destination or {"alone": 1})


def patch_extra_state_of_the_class(patch, model):
    patch.setattr(type(model), "get_extra_state", lambda _: {"scale": 2.0}, raising=False)


def patch_save_to_state_dict_of_all(patch, model):
    patch.setattr(nn.Module, "_save_to_state_dict", lambda *_: None)


@pytest.mark.parametrize(
    "change",
    [
        patch_state_dict_of_the_class,
        patch_state_dict_of_all,
        patch_extra_state_of_the_class,
        patch_save_to_state_dict_of_all,
    ],
)
def test_class_with_another_method_is_noticed(change, monkeypatch):
    model = model_of()
    structure = Structure.of(model, model.state_dict(keep_vars=True).values(), with_grad=True)
    change(monkeypatch, model)
    assert not structure.is_unchanged()


@pytest.mark.parametrize("place", [0, 255, 256, 299])
def test_change_is_noticed_in_any_of_many_modules(place):
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(300)))
    structure = Structure.of(model, model.state_dict(keep_vars=True).values(), with_grad=True)
    assert structure.is_unchanged()
    model[place].weight.data = torch.zeros(2, 2)
    assert not structure.is_unchanged()
    structure = Structure.of(model, model.state_dict(keep_vars=True).values(), with_grad=True)
    model[place].bias = nn.Parameter(torch.zeros(2))
    assert not structure.is_unchanged()


class Hiding(nn.Module):
    """Hides a module from what goes through its modules, but not from its state dict."""

    def __init__(self):
        super().__init__()
        self.shown, self.hidden = nn.Linear(2, 2), nn.Linear(2, 2)

    def modules(self):
        return iter([self, self.shown])


def test_change_in_a_module_that_hides_is_noticed():
    model = Hiding()
    structure = Structure.of(model, model.state_dict(keep_vars=True).values(), with_grad=True)
    model.hidden.register_buffer("late", torch.ones(1))
    assert not structure.is_unchanged()


@pytest.mark.parametrize("count", [1, 3])
def test_negation_at_the_same_place_is_noticed(count):
    pairs = torch.ones(count, 2)
    model = holding(pairs[:, 1])
    structure = Structure.of(model, [model.value], with_grad=True)
    assert structure.is_unchanged()
    negated = torch.view_as_complex(pairs).conj().imag
    assert negated.data_ptr() == model.value.data_ptr()
    model.value.data = negated
    assert not structure.is_unchanged()


def holding(value):
    model = nn.Module()
    model.register_buffer("value", value)
    return model


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: torch.jit.script(nn.Sequential(nn.Linear(2, 2))), id="scripted"),
        pytest.param(lambda: torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), id="traced"),
        pytest.param(lambda: nn.Sequential(Stateful(2, 2)), id="extra state"),
        pytest.param(lambda: nn.Sequential(Doubled(2, 2)), id="own method"),
        pytest.param(lambda: nn.LazyLinear(2), id="lazy"),
        pytest.param(lambda: nn.Linear(2, 2, device="meta"), id="meta"),
        pytest.param(lambda: nn.Linear(2, 2, dtype=torch.complex64), id="complex"),
        pytest.param(lambda: holding(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])), id="nested"),
    ],
)
def test_model_that_torch_alone_does_not_decide_is_unknown(make):
    model = make()
    assert Structure.of(model, model.state_dict(keep_vars=True).values(), with_grad=True) is None


def test_training_changes_nothing():
    model = model_of()
    structure = Structure.of(model, model.state_dict(keep_vars=True).values(), with_grad=True)
    optimizer = torch.optim.Adam(model.parameters())
    model.norm(model.last(model.first(torch.randn(3, 4)))).sum().backward()
    optimizer.step()
    model.train()
    model.zero_grad()
    model.load_state_dict(model_of().state_dict())
    assert structure.is_unchanged()


class Asked(torch.overrides.TorchFunctionMode):
    """Counts what torch is asked."""

    count = 0

    def __torch_function__(self, function, _types, arguments=(), named=None):
        self.count += 1
        return function(*arguments, **(named or {}))


def test_mode_of_torch_is_not_asked_about_each_tensor():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(100)))
    structure = Structure.of(model, model.state_dict(keep_vars=True).values(), with_grad=True)
    with Asked() as asked:
        assert structure.is_unchanged()
    assert asked.count == 0


def test_frozen_weight_matters_only_where_it_is_asked_for():
    model = model_of()
    values = list(model.state_dict(keep_vars=True).values())
    strict = Structure.of(model, values, with_grad=True)
    loose = Structure.of(model, values, with_grad=False)
    model.first.weight.requires_grad_(False)
    assert loose.is_unchanged()
    assert not strict.is_unchanged()

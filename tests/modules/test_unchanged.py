"""What changes in a model between two bests is in the second, though its state dict is not asked for each time."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import register_parametrization

from keepbest import BestKeeper
from keepbest.modules.unchanged import Structure
from tests.capture.test_strategies import read_files
from tests.kit.runs import update

MODES = [("torch", False), ("torch", True), ("safetensors", True), ("dcp", True)]


class Alone(nn.Module):
    """A module that has one weight, or none."""

    def __init__(self, weight=None):
        super().__init__()
        if weight is not None:
            self.weight = nn.Parameter(weight)


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.empty = nn.Linear(4, 4, bias=False)
        self.last = nn.Linear(4, 4, bias=False)
        self.norm = nn.BatchNorm1d(4)
        self.one, self.other = Alone(torch.randn(3)), Alone()
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("scratch", torch.ones(2), persistent=False)


class Doubled(nn.Linear):
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "doubled"] = self.weight.detach() * 2


class Stateful(nn.Linear):
    def get_extra_state(self):
        return {"scale": 3.0}

    def set_extra_state(self, state):
        pass


class Named(torch.Tensor):
    pass


class Symmetric(nn.Module):
    def forward(self, value):
        return value.triu() + value.triu(1).transpose(-1, -2)


def model_of():
    torch.manual_seed(1)
    return Several()


def replace_parameter(model):
    model.first.weight = nn.Parameter(torch.randn(4, 4))


def replace_parameter_by_another_shape(model):
    model.first.weight = nn.Parameter(torch.randn(2, 4))


def assign_data(model):
    model.first.weight.data = torch.randn(4, 4)


def assign_transposed_data(model):
    model.first.weight.data = model.first.weight.data.t()


def assign_transposed_data_elsewhere(model):
    model.first.weight.data = torch.randn(4, 4).t()


def assign_data_of_another_shape(model):
    model.first.weight.data = model.first.weight.data[:2]


def assign_data_of_another_dtype(model):
    model.first.weight.data = model.first.weight.data.to(torch.float16)


def assign_expanded_data(model):
    model.first.weight.data = torch.randn(4).expand(4, 4)


def assign_views_of_one_storage(model):
    flat = torch.randn(64)
    model.first.weight.data = flat[:16].view(4, 4)
    model.last.weight.data = flat[16:32].view(4, 4)


def assign_negated_view(model):
    model.first.weight.data = torch._neg_view(model.first.weight.data)


def make_complex(model):
    model.scale = torch.complex(torch.ones(3), torch.ones(3)).conj()


def swap_tensors(model):
    torch.utils.swap_tensors(model.first.weight, nn.Parameter(torch.randn(4, 4)))


def swap_in_another_shape(model):
    torch.utils.swap_tensors(model.first.weight, nn.Parameter(torch.randn(3, 4)))


def swap_two(model):
    torch.utils.swap_tensors(model.first.weight, model.last.weight)


def to_double(model):
    model.to(torch.float64)


def to_double_by_swapping(model):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def half(model):
    model.half()


def load_by_assignment(model):
    state = {key: value.clone().double() for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def add_buffer(model):
    model.register_buffer("late", torch.randn(2))


def delete_buffer(model):
    del model.scale


def hide_buffer(model):
    model.register_buffer("scale", model.scale, persistent=False)


def show_buffer(model):
    model.register_buffer("scratch", model.scratch, persistent=True)


def hide_buffer_by_its_set(model):
    model._non_persistent_buffers_set = {"scale", "scratch"}


def unset_parameter(model):
    model.first.bias = None


def set_parameter_that_was_none(model):
    model.last.bias = nn.Parameter(torch.randn(4))


def turn_parameter_into_buffer(model):
    weight = model.one.weight
    del model.one.weight
    model.one.register_buffer("weight", weight)


def move_parameter_to_the_next_module(model):
    model.other.weight = model.one.weight
    del model.one.weight


def replace_submodule(model):
    model.first = nn.Linear(4, 4)


def replace_submodule_around_the_same_weights(model):
    other = nn.Linear(4, 4)
    other.bias, other.weight = model.first.bias, model.first.weight
    model.first = other


def add_submodule(model):
    model.late = nn.Linear(2, 2)


def remove_submodule(model):
    del model.last


def rename_submodule(model):
    model._modules = {{"last": "end"}.get(name, name): module for name, module in model._modules.items()}


def rename_submodule_in_place(model):
    modules = list(model._modules.items())
    model._modules.clear()
    model._modules.update({{"last": "end"}.get(name, name): module for name, module in modules})


def reorder_submodules(model):
    first = model._modules.pop("first")
    model._modules["first"] = first


def swap_submodules(model):
    model.first, model.norm = model.norm, model.first


def wrap_submodule(model):
    model.first = nn.Sequential(model.first)


def tie(model):
    model.last.weight = model.first.weight


def tie_by_data(model):
    model.last.weight.data = model.first.weight.data


def replace_table_of_parameters(model):
    model.first._parameters = OrderedDict(weight=nn.Parameter(torch.randn(4, 4)))


def replace_table_of_buffers(model):
    model._buffers = {"scale": torch.randn(5)}


def empty_table_of_parameters(model):
    model.first._parameters.clear()


def parametrize(model):
    register_parametrization(model.first, "weight", Symmetric())


def weight_norm(model):
    parametrizations.weight_norm(model.first)


def weight_norm_of_old(model):
    torch.nn.utils.weight_norm(model.first)


def spectral_norm(model):
    parametrizations.spectral_norm(model.first)


def spectral_norm_of_old(model):
    torch.nn.utils.spectral_norm(model.first)


def prune_weights(model):
    prune.random_unstructured(model.first, "weight", amount=0.5)


def add_to(state, prefix):
    state[prefix + "hooked"] = torch.ones(1)


def post_hook(model):
    model.register_state_dict_post_hook(lambda _module, state, prefix, _metadata: add_to(state, prefix))


def private_hook(model):
    model._register_state_dict_hook(lambda _module, state, prefix, _metadata: add_to(state, prefix))


def hook_of_a_child(model):
    model.first.register_state_dict_post_hook(lambda _module, state, prefix, _metadata: add_to(state, prefix))


def pre_hook(model):
    model.norm.register_state_dict_pre_hook(
        lambda module, _prefix, _keep: module.register_buffer("late", torch.ones(1))
    )


def own_state_dict(model):
    model.state_dict = lambda *_args, **_kwargs: {"alone": torch.ones(2)}


def own_state_dict_of_a_child(model):
    def state_dict(*_args, destination, prefix="", **_kwargs):
        destination[prefix + "alone"] = torch.ones(2)

    model.first.state_dict = state_dict


def own_save_to_state_dict(model):
    model.first._save_to_state_dict = lambda destination, prefix, _: add_to(destination, prefix)


def another_class(model):
    model.first.__class__ = Doubled


def class_with_extra_state(model):
    model.first.__class__ = Stateful


def swap_in_a_sparse_tensor(model):
    torch.utils.swap_tensors(model.first.weight, nn.Parameter(torch.eye(4).to_sparse()))


def swap_in_a_subclass(model):
    torch.utils.swap_tensors(model.first.weight, torch.randn(4, 4).as_subclass(Named))


def swap_in_shared_memory(model):
    model.share_memory()


CHANGES = [
    replace_parameter,
    replace_parameter_by_another_shape,
    assign_data,
    assign_transposed_data,
    assign_transposed_data_elsewhere,
    assign_data_of_another_shape,
    assign_data_of_another_dtype,
    assign_expanded_data,
    assign_views_of_one_storage,
    assign_negated_view,
    make_complex,
    swap_tensors,
    swap_in_another_shape,
    swap_two,
    swap_in_a_sparse_tensor,
    swap_in_a_subclass,
    swap_in_shared_memory,
    to_double,
    to_double_by_swapping,
    half,
    load_by_assignment,
    add_buffer,
    delete_buffer,
    hide_buffer,
    show_buffer,
    hide_buffer_by_its_set,
    unset_parameter,
    set_parameter_that_was_none,
    turn_parameter_into_buffer,
    move_parameter_to_the_next_module,
    replace_submodule,
    replace_submodule_around_the_same_weights,
    add_submodule,
    remove_submodule,
    rename_submodule,
    rename_submodule_in_place,
    reorder_submodules,
    swap_submodules,
    wrap_submodule,
    tie,
    tie_by_data,
    replace_table_of_parameters,
    replace_table_of_buffers,
    empty_table_of_parameters,
    parametrize,
    weight_norm,
    weight_norm_of_old,
    spectral_norm,
    spectral_norm_of_old,
    prune_weights,
    post_hook,
    private_hook,
    hook_of_a_child,
    pre_hook,
    own_state_dict,
    own_state_dict_of_a_child,
    own_save_to_state_dict,
    another_class,
    class_with_extra_state,
]


NOT_KEPT = {
    ("safetensors", swap_in_a_sparse_tensor),
    ("dcp", swap_in_a_sparse_tensor),
    ("safetensors", make_complex),
    ("safetensors", class_with_extra_state),
    ("dcp", class_with_extra_state),  # it has a file of its own
}


def state_of(model):
    return {key: values_of(value) for key, value in model.state_dict().items()}


def values_of(value):
    return copy.deepcopy(value.to_dense() if isinstance(value, torch.Tensor) and value.is_sparse else value)


def assert_holds(keeper, expected, file_format):
    keeper.flush()
    state = read_files(keeper.best_path, file_format)["model"]
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert state[key].dtype == value.dtype, key
            assert torch.equal(values_of(state[key]), value), key
        else:
            assert state[key] == value, key


def spoil(model):
    """Training continues while the snapshot is written."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if 0 not in tensor.stride():
                tensor.zero_()


def keep_changed(change, directory, file_format, in_background, **settings):
    model = model_of()
    with BestKeeper(
        model, directory=directory, metric_key="loss", format=file_format, async_save=in_background, **settings
    ) as keeper:
        keeper.observe(0.0, update(1))
        change(model)
        for number in (2, 3):
            expected = state_of(model)
            keeper.observe(-number, update(number))
            spoil(model)
            assert_holds(keeper, expected, file_format)


@pytest.mark.parametrize("change", [change for change in CHANGES if change is not swap_in_a_subclass])
def test_change_between_two_bests_is_in_the_second(change, tmp_path):
    for file_format, in_background in MODES:
        if (file_format, change) in NOT_KEPT:
            continue
        keep_changed(change, tmp_path / f"{file_format}-{in_background}", file_format, in_background)


@pytest.mark.parametrize("change", CHANGES)
def test_change_is_noticed(change):
    model = model_of()
    values = model.state_dict(keep_vars=True).values()
    assert Structure.is_known(model, values)
    structure = Structure(model, values)
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
    structure = Structure(model, model.state_dict(keep_vars=True).values())
    change(monkeypatch, model)
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
    structure = Structure(model, model.state_dict(keep_vars=True).values())
    model.hidden.register_buffer("late", torch.ones(1))
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
    assert not Structure.is_known(model, model.state_dict(keep_vars=True).values())


def test_training_changes_nothing():
    model = model_of()
    structure = Structure(model, model.state_dict(keep_vars=True).values())
    optimizer = torch.optim.Adam(model.parameters())
    model.norm(model.last(model.first(torch.randn(3, 4)))).sum().backward()
    optimizer.step()
    model.train()
    model.zero_grad()
    model.load_state_dict(model_of().state_dict())
    assert structure.is_unchanged()


class Bare(nn.Module):
    """A weight that, as a buffer, would have the same place among all names."""

    def __init__(self):
        super().__init__()
        self.weight, self.last = nn.Parameter(torch.ones(2), requires_grad=False), nn.Linear(2, 2)


def freeze(model):
    model.first.weight.requires_grad_(False)


def freeze_by_swapping(model):
    torch.utils.swap_tensors(model.first.weight, nn.Parameter(torch.randn(4, 4), requires_grad=False))


@pytest.mark.parametrize("change", [freeze, freeze_by_swapping])
def test_weight_that_is_frozen_later_is_left_out(change, tmp_path):
    model = model_of()
    with BestKeeper(model, directory=tmp_path, metric_key="loss", save_frozen_weights=False) as keeper:
        keeper.observe(3.0, update(1))
        change(model)
        keeper.observe(2.0, update(2))
        frozen = torch.load(keeper.best_path / "model.pt")
        model.first.weight.requires_grad_(True)
        keeper.observe(1.0, update(3))
        thawed = torch.load(keeper.best_path / "model.pt")
    assert model.state_dict().keys() - frozen.keys() == {"first.weight"}
    assert model.state_dict().keys() == thawed.keys()


def test_frozen_weight_that_becomes_a_buffer_is_kept(tmp_path):
    model = Bare()
    with BestKeeper(model, directory=tmp_path, metric_key="loss", save_frozen_weights=False) as keeper:
        keeper.observe(2.0, update(1))
        weight = model.weight
        del model.weight
        model.register_buffer("weight", weight)
        keeper.observe(1.0, update(2))
        state = torch.load(keeper.best_path / "model.pt")
    assert state.keys() == model.state_dict().keys()


def test_parts_that_overlap_have_what_changed(tmp_path):
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "head": nn.Linear(2, 2)})
    names = {"all": None, "body": ["body"], "both": ["body.1", "head"]}
    keepers = {
        name: BestKeeper(model, directory=tmp_path, metric_key="loss", id=name, model_names=each)
        for name, each in names.items()
    }
    for number, change in enumerate((lambda: None, lambda: tie_head(model), lambda: replace_body(model)), start=1):
        change()
        for name, keeper in keepers.items():
            keeper.observe(-number, update(number))
            for part, state in read_files(keeper.best_path, "torch").items():
                expected = model.get_submodule("" if part == "model" else part).state_dict()
                assert state.keys() == expected.keys(), name
                assert all(torch.equal(state[key], value) for key, value in expected.items()), name
    for keeper in keepers.values():
        keeper.close()


def tie_head(model):
    model["head"].weight = model["body"][1].weight


def replace_body(model):
    model["body"] = nn.Sequential(model["body"][1], nn.Linear(2, 3))

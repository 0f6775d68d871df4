"""Ways to change a model between two bests."""

from __future__ import annotations

import warnings
from collections import OrderedDict

import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import register_parametrization


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
    pairs = torch.stack([model.first.weight.data] * 2, dim=-1)
    model.first.weight.data = torch.view_as_complex(pairs).conj().imag


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


def swap_in_a_nested_tensor(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that nested tensors are a prototype
        nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    torch.utils.swap_tensors(model.first.weight, nn.Parameter(nested))


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

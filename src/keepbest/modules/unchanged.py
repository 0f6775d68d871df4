"""Whether a state dict would hold the same tensors as before, without asking for it. **Rank-local**."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from keepbest.modules.kinds import PLAIN_CLASSES

# What decides what a state dict has, as torch wrote it. A module that has one of its own may do what it likes.
_METHODS = {
    name: getattr(nn.Module, name)
    for name in (
        "state_dict",
        "_save_to_state_dict",
        "get_extra_state",
        "named_parameters",
        "named_buffers",
        "named_modules",
    )
}
_TABLES = ("_modules", "_parameters", "_buffers")


class Structure:
    """The modules of a model, and where its tensors lie.

    To call `state_dict()` takes several times as long as to copy small weights, and to see that it would give the same
    takes a fraction of that. Tensors can be moved, and their memory is freed then. It keeps those that are replaced.

    Args:
        model: Model of which `is_known` holds.
        values: Tensors that its state dict has.
    """

    def __init__(self, model: nn.Module, values: Iterable[torch.Tensor]) -> None:
        self._modules = _modules_of(model)
        self._types = list(map(type, self._modules))
        self._tables = _tables(self._modules)
        self._sizes = list(map(len, self._tables))
        self._names = list(chain.from_iterable(self._tables))
        self._members = list(_members(self._tables))
        self._passing = list(map(set, _passing(self._modules)))
        self._values = list(values)
        self._kinds = list(map(_kind_of, self._values))
        self._addresses = list(map(torch.Tensor.data_ptr, self._values))
        self._strides = list(map(torch.Tensor.stride, self._values))
        self._signs = list(map(torch.Tensor.is_neg, self._values))

    @staticmethod
    def is_known(model: nn.Module, values: Iterable[object]) -> bool:
        """Whether nothing but torch decides what the state dict of a model has, and all of it is plain tensors."""
        modules = _modules_of(model)
        # Those of TorchScript are made anew each time that they are asked for.
        has_tables = all(type(table) in (dict, OrderedDict) for table in _tables(modules))
        return has_tables and _is_of_torch(modules) and all(map(_is_plain_tensor, values))

    def is_unchanged(self) -> bool:
        """Whether the state dict of the model would have the same tensors, at the same places, under the same names."""
        # Nothing that has thousands of tuples at once, since the collector of garbage would look through all objects.
        tables = _tables(self._modules)
        return (
            _same(map(type, self._modules), self._types)
            and _same(tables, self._tables)
            and list(map(len, tables)) == self._sizes  # else what moves from one to the next would not be seen
            and _same(_members(tables), self._members)
            and list(chain.from_iterable(tables)) == self._names
            and _is_of_torch(self._modules)
            and _passing(self._modules) == self._passing
            and all(map(operator.eq, map(_kind_of, self._values), self._kinds))  # else they may have no place
            and list(map(torch.Tensor.data_ptr, self._values)) == self._addresses
            and all(map(operator.eq, map(torch.Tensor.stride, self._values), self._strides))
            and list(map(torch.Tensor.is_neg, self._values)) == self._signs
        )


def _modules_of(model: nn.Module) -> list[nn.Module]:
    """The modules that `state_dict` goes through. A model may have a `modules()` of its own that hides some."""
    found: dict[nn.Module, None] = {model: None}
    pending = [model]
    while pending:
        for child in dict.values(_dict_of(pending.pop(), "_modules")):
            if child is not None and child not in found:
                found[child] = None
                pending.append(child)
    return list(found)


def _dict_of(module: nn.Module, name: str) -> dict[str, Any]:
    table = vars(module).get(name)
    return table if isinstance(table, dict) else {}


def _is_plain_tensor(value: object) -> bool:
    if not isinstance(value, PLAIN_CLASSES) or type(value) not in PLAIN_CLASSES or value.layout != torch.strided:
        return False
    return not (value.is_nested or value.is_quantized or value.is_meta or value.is_complex() or value.is_neg())


def _tables(modules: Sequence[nn.Module]) -> list[Any]:
    """Where torch keeps what is in modules; replaced as a whole by some, such as `torch.nn.utils.parametrize`."""
    return [own.get(name) for own in map(vars, modules) for name in _TABLES]


def _members(tables: Iterable[dict[str, Any]]) -> Iterable[object]:
    return chain.from_iterable(map(dict.values, tables))


def _passing(modules: Iterable[nn.Module]) -> list[set[str]]:
    """Names of the buffers that are in no state dict."""
    return [vars(module)["_non_persistent_buffers_set"] for module in modules]


_kind_of = operator.attrgetter("__class__", "layout", "is_nested", "dtype", "device", "requires_grad", "shape")


def _same(now: Iterable[object], then: Sequence[object]) -> bool:
    now = list(now)
    return len(now) == len(then) and all(map(operator.is_, now, then))


def _is_of_torch(modules: Iterable[nn.Module]) -> bool:
    """Whether there are no hooks on state dicts, and no class or module has a `state_dict` of its own."""
    kinds = set(map(type, modules))
    return all(getattr(kind, name) is method for kind in kinds for name, method in _METHODS.items()) and not any(
        own["_state_dict_hooks"] or own["_state_dict_pre_hooks"] or "state_dict" in own or "_save_to_state_dict" in own
        for own in map(vars, modules)
    )

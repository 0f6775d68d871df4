"""Whether a state dict would hold the same tensors as before, without asking for it. **Rank-local**."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from keepbest.modules.kinds import PLAIN_CLASSES, form_of

_METHODS = ("state_dict", "_save_to_state_dict", "get_extra_state")


class Structure:
    """The modules of a model, and where its tensors lie.

    To call `state_dict()` takes several times as long as to copy small weights, and to see that it would give the same
    takes a fraction of that. It holds no memory of the weights, so that they can be moved and freed.

    Args:
        model: Model of which `is_known` holds.
        values: Tensors that its state dict has.
    """

    def __init__(self, model: nn.Module, values: Iterable[torch.Tensor]) -> None:
        self._model = model
        self._modules = list(model.modules())
        self._tables = _tables(self._modules)
        self._names = [name for table in self._tables for name in table]
        self._members = [member for table in self._tables for member in table.values()]
        self._passing = [frozenset(each) for each in _passing(self._modules)]
        self._types = list(map(type, self._modules))
        self._values = list(values)
        self._places = [_place(value) for value in self._values]

    @staticmethod
    def is_known(model: nn.Module, values: Iterable[object]) -> bool:
        """Whether nothing but torch decides what the state dict of a model has, and all of it is plain tensors."""
        return _is_plain(model.modules()) and all(
            isinstance(value, PLAIN_CLASSES)
            and type(value) in PLAIN_CLASSES
            and not (form_of(value) or value.is_complex())
            for value in values
        )

    def is_unchanged(self) -> bool:
        """Whether the state dict of the model would have the same tensors, at the same places, under the same names."""
        tables = _tables(self._modules)
        return (
            _same(tables, self._tables)
            and _same([member for table in tables for member in table.values()], self._members)
            and [name for table in tables for name in table] == self._names
            and _same(map(type, self._modules), self._types)
            and _is_untouched(self._modules)
            and all(now == then for now, then in zip(_passing(self._modules), self._passing, strict=True))
            and all(map(_is_at, self._values, self._places))
        )


def _tables(modules: Sequence[nn.Module]) -> list[dict[str, Any]]:
    """Where torch keeps what is in modules; replaced as a whole by some, such as `torch.nn.utils.parametrize`."""
    return [
        table
        for module in modules
        for own in (vars(module),)
        for table in (own["_modules"], own["_parameters"], own["_buffers"])
    ]


def _passing(modules: Iterable[nn.Module]) -> list[set[str]]:
    """Names of the buffers that are in no state dict."""
    return [vars(module)["_non_persistent_buffers_set"] for module in modules]


def _place(value: torch.Tensor) -> tuple[object, ...]:
    return value.data_ptr(), value.shape, value.stride(), value.dtype, value.requires_grad, value.device


def _is_at(value: torch.Tensor, place: tuple[object, ...]) -> bool:
    return _place(value) == place


def _same(now: Iterable[object], then: Sequence[object]) -> bool:
    now = list(now)
    return len(now) == len(then) and all(map(operator.is_, now, then))


def _is_plain(modules: Iterable[nn.Module]) -> bool:
    modules = list(modules)
    methods = {(kind, name) for kind in set(map(type, modules)) for name in _METHODS}
    return _is_untouched(modules) and all(getattr(kind, name) is getattr(nn.Module, name) for kind, name in methods)


def _is_untouched(modules: Iterable[nn.Module]) -> bool:
    """Whether there are no hooks on state dicts, and no module has a `state_dict` of its own."""
    return not any(
        own["_state_dict_hooks"] or own["_state_dict_pre_hooks"] or "state_dict" in own for own in map(vars, modules)
    )

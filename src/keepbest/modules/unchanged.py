"""Whether a state dict would hold the same tensors as before, without asking for it. **Rank-local**."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, repeat
from typing import Any, TypeVar

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
_PIECE = 256
_TABLES = ("_modules", "_parameters", "_buffers")
_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks")
_PARTS = list(map(operator.itemgetter, (*_TABLES, *_HOOKS, "_non_persistent_buffers_set")))


T = TypeVar("T")


class Structure:
    """The modules of a model, and where its tensors lie.

    To call `state_dict()` takes several times as long as to copy small weights, and to see that it would give the same
    takes a fraction of that. Tensors can be moved, and their memory is freed then. It keeps those that are replaced.

    Args:
        modules: Modules whose state dicts torch alone decides on.
        values: Plain tensors that are in them.
        with_grad: Whether it matters which of them require grad.
    """

    def __init__(self, modules: Sequence[nn.Module], values: Sequence[torch.Tensor], *, with_grad: bool) -> None:
        self._pieces: list[_Modules | _Tensors] = [*map(_Modules, _pieces_of(modules))]
        self._pieces += [_Tensors(piece, with_grad=with_grad) for piece in _pieces_of(values)]

    @classmethod
    def of(cls, model: nn.Module, values: Iterable[Any], *, with_grad: bool) -> Structure | None:
        """That of a model and of the `values` in its state dict.

        It is `None` where others than torch decide what the state dict has, or where it has more than plain tensors.
        """
        modules, values = _modules_of(model), list(values)
        owns = list(map(vars, modules))
        # Those of TorchScript are made anew each time that they are asked for.
        has_tables = all(type(table) in (dict, OrderedDict) for table in _tables(owns))
        has_hooks = any(own[name] for own in owns for name in _HOOKS)
        is_of_torch = has_tables and not has_hooks and _is_of_torch(set(map(type, modules)), owns)
        return cls(modules, values, with_grad=with_grad) if is_of_torch and all(map(_is_plain_tensor, values)) else None

    def is_unchanged(self) -> bool:
        """Whether the state dict of the model would have the same tensors, at the same places, under the same names."""
        # They are plain, and a mode such as torch.set_default_device would run Python for all that is asked of each.
        with torch._C.DisableTorchFunction():  # noqa: SLF001  # see ADR 10
            return all(piece.is_unchanged() for piece in self._pieces)


class _Modules:
    """Some modules of a model. Each comparison goes through all of them in C.

    Nothing has thousands of tuples at once, since the collector of garbage would look through all objects then.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._types = list(map(type, modules))
        self._kinds = set(self._types)
        owns = list(map(vars, modules))
        self._parts = [list(map(part, owns)) for part in _PARTS]
        self._tables = list(_tables(owns))
        self._sizes = list(map(len, self._tables))
        self._filled = [table for table in self._tables if table]
        self._names = list(chain.from_iterable(self._filled))
        self._members = list(_members(self._filled))
        self._hooks = [own[name] for own in owns for name in _HOOKS]
        # Where a module has no buffer, it does not matter which ones would not be in the state dict.
        self._passing_now = [own["_non_persistent_buffers_set"] for own in owns if own["_buffers"]]
        self._passing = list(map(set, self._passing_now))

    def is_unchanged(self) -> bool:
        """Whether they are as they were. What is compared first makes sure of what comes after it."""
        owns = list(map(vars, self._modules))
        return (
            _same(map(type, self._modules), self._types)
            and all(_same(map(part, owns), then) for part, then in zip(_PARTS, self._parts, strict=True))
            and list(map(len, self._tables)) == self._sizes  # else what moves from one to the next would not be seen
            and _same(_members(self._filled), self._members)
            and list(chain.from_iterable(self._filled)) == self._names
            and not any(self._hooks)
            and _is_of_torch(self._kinds, owns)
            and self._passing_now == self._passing
        )


class _Tensors:
    """Some tensors, and where they lie.

    Of thousands none is in the cache of the processor, and what takes long is to fetch them. So no more of each is
    looked at than is needed: its address says on which device it is, and whether it requires grad lies apart.
    """

    def __init__(self, values: Sequence[torch.Tensor], *, with_grad: bool) -> None:
        self._values = values
        self._types = list(map(type, values))
        self._addresses = list(map(torch.Tensor.data_ptr, values))
        self._dtypes = list(map(_dtype, values))
        self._shapes = list(map(_shape, values))
        self._are_contiguous = list(map(torch.Tensor.is_contiguous, values))
        self._grads = list(map(_requires_grad, values)) if with_grad else None
        # The shape of a contiguous tensor says where its elements lie. And one of several elements is no negation, that
        # is a view of imaginary parts with the real ones between them, unless as_strided() laid it elsewhere.
        self._others = [
            value
            for value, is_one in zip(values, self._are_contiguous, strict=True)
            if not is_one or value.numel() == 1
        ]
        self._strides = list(map(torch.Tensor.stride, self._others))
        self._signs = list(map(torch.Tensor.is_neg, self._others))

    def is_unchanged(self) -> bool:
        """Whether the same values would be read at the same places."""
        try:
            return (
                list(map(type, self._values)) == self._types
                and list(map(torch.Tensor.data_ptr, self._values)) == self._addresses
                and list(map(_dtype, self._values)) == self._dtypes
                and list(map(_shape, self._values)) == self._shapes
                and list(map(torch.Tensor.is_contiguous, self._values)) == self._are_contiguous
                and (self._grads is None or list(map(_requires_grad, self._values)) == self._grads)
                and list(map(torch.Tensor.stride, self._others)) == self._strides
                and list(map(torch.Tensor.is_neg, self._others)) == self._signs
            )
        except RuntimeError:  # of torch: what has another layout now, or is nested, has no address or no shape
            return False


def _pieces_of(all_of_them: Sequence[T]) -> list[Sequence[T]]:
    """Few enough in each that a second look at them finds them in the cache of the processor."""
    return [all_of_them[start : start + _PIECE] for start in range(0, len(all_of_them), _PIECE)]


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


def _tables(owns: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
    """Where torch keeps what is in modules; replaced as a whole by some, such as `torch.nn.utils.parametrize`."""
    return (own.get(name) for own in owns for name in _TABLES)


def _members(tables: Iterable[dict[str, Any]]) -> Iterator[object]:
    return chain.from_iterable(map(dict.values, tables))


_dtype, _shape = operator.attrgetter("dtype"), operator.attrgetter("shape")
_requires_grad = operator.attrgetter("requires_grad")


def _same(now: Iterable[object], then: Sequence[object]) -> bool:
    now = list(now)
    return len(now) == len(then) and all(map(operator.is_, now, then))


def _is_of_torch(kinds: Iterable[type], owns: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no class or module has a `state_dict` of its own."""
    return all(getattr(kind, name) is method for kind in kinds for name, method in _METHODS.items()) and not any(
        any(map(operator.contains, owns, repeat(name))) for name in ("state_dict", "_save_to_state_dict")
    )

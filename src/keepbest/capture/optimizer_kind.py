"""What kind of optimizer one is, so that the state of another kind is not loaded into it. **Rank-local**."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

_HOW = ("foreach", "fused", "capturable", "differentiable", "maximize")  # torch adds such options from time to time


def kind_of(optimizer: Optimizer) -> str:
    """The name of its class: of the one of torch that it is, or is derived from, else of its own.

    The name alone, since the module of a class in a script is another one where the script is imported.
    """
    kind = type(unwrapped(optimizer))
    return next((each.__name__ for each in kind.__mro__ if _is_of_torch(each)), kind.__name__)


def is_by_element(optimizer: Optimizer) -> bool:
    """Whether what has the shape of a parameter in its state is known to belong to it element by element."""
    return _is_of_torch(type(unwrapped(optimizer)))


def fault_of_kind(optimizer: Optimizer, kinds: Iterable[object], groups: Iterable[Mapping[str, Any]]) -> str | None:
    """Why an optimizer cannot take what another one had.

    Args:
        optimizer: Optimizer that is to load it.
        kinds: Kinds of the optimizers that were saved, as `kind_of` gives them.
        groups: Groups that were saved.
    """
    here = kind_of(optimizer)
    if (other := next((kind for kind in kinds if kind != here), None)) is not None:
        return f"it was saved from {other!r}, and is to be loaded into {here!r}. Make an optimizer of the saved kind"
    if is_by_element(optimizer) and list(kinds):
        return None  # torch itself fills in the options that an older version had not
    expected = getattr(unwrapped(optimizer), "defaults", {}).keys() - {*_HOW}  # a wrapper may have none
    lacking = sorted({key for group in groups for key in expected - group.keys()})
    if lacking:
        return (
            f"it was saved without the options {', '.join(map(repr, lacking))}, which {here!r} needs. Make an "
            "optimizer of the kind that was saved"
        )
    return None


def options_for(own: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Stored options of a group, in the form that they have in a group of the optimizer that takes them.

    One that is compiled wants a tensor as its learning rate, which others refuse.
    """
    return {key: _like(value, own.get(key)) for key, value in stored.items()}


def _like(value: Any, own: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.numel() == 1 and type(own) in (int, float):
        return value.item()
    if isinstance(own, torch.Tensor) and own.numel() == 1 and type(value) in (int, float):
        return torch.full_like(own, value)
    return value


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """What is inside of wrappers such as that of Accelerate, or that of torch for local SGD."""
    seen = set[int]()
    while (inner := _inside(optimizer)) is not None and id(inner) not in seen:
        seen.add(id(inner))
        optimizer = inner
    return optimizer


def _inside(optimizer: Optimizer) -> Optimizer | None:
    held = (getattr(optimizer, name, None) for name in ("optimizer", "optim"))
    return next((each for each in held if isinstance(each, Optimizer)), None)


def _is_of_torch(kind: type) -> bool:
    return kind is not Optimizer and issubclass(kind, Optimizer) and kind.__module__.startswith("torch.optim.")

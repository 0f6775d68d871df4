"""What kind of optimizer one is, so that the state of another kind is not loaded into it. **Rank-local**."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim import LBFGS, Adafactor, Optimizer

from keepbest.capture.fsdp1 import is_flattened
from keepbest.errors import ConfigError
from keepbest.modules.kinds import is_dtensor

HOW = ("foreach", "fused", "capturable", "differentiable")
"""Options of how an optimizer computes here, not of what."""
_ADDED_BY_TORCH = {*HOW, "maximize"}  # from time to time, so an older version may have saved none of these


def kind_of(optimizer: Optimizer) -> str:
    """The name of its class: of the one of torch that it is, or is derived from, else of its own.

    The name alone, since the module of a class in a script is another one where the script is imported.
    """
    kind = type(unwrapped(optimizer))
    return next((each.__name__ for each in kind.__mro__ if _is_of_torch(each)), kind.__name__)


def is_by_element(optimizer: Optimizer) -> bool:
    """Whether what has the shape of a parameter in its state is known to belong to it element by element."""
    return _is_of_torch(type(unwrapped(optimizer)))


def fault_in_shards(optimizer: Optimizer) -> str | None:
    """Why the state of an optimizer is known, by its kind, not to be kept as its parameters are sharded.

    The first step makes that state, so nothing else shows it before training.
    """
    inside = unwrapped(optimizer)
    if not isinstance(inside, LBFGS | Adafactor):
        return None
    parameters = [parameter for group in inside.param_groups for parameter in group["params"]]
    sharded = [each for each in parameters if is_dtensor(each)]
    if isinstance(inside, LBFGS) and (sharded or any(map(is_flattened, parameters))):
        return (
            "the state of LBFGS belongs to all parameters together, so it cannot be put together from "
            f"{'DTensors' if sharded else 'the shards of FSDP1'}. Use DDP, or leave the optimizer out of training_state"
        )
    if (
        isinstance(inside, Adafactor)
        and (matrix := next((each for each in sharded if each.dim() > 1), None)) is not None
    ):
        return (
            "Adafactor keeps one state for the rows of a matrix and one for its columns, and it is not known how to "
            f"share these out where the matrix is a DTensor, such as its parameter of shape {list(matrix.shape)}. Use "
            "DDP or FSDP1, or leave the optimizer out of training_state"
        )
    return None


def refuse_in_shards(optimizer: Optimizer) -> None:
    """Raises `ConfigError` where `fault_in_shards` finds something."""
    if (fault := fault_in_shards(optimizer)) is not None:
        raise ConfigError(fault)


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
    expected = getattr(unwrapped(optimizer), "defaults", {}).keys() - _ADDED_BY_TORCH  # a wrapper may have none
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
    """What is inside of wrappers such as that of Accelerate."""
    return layers(optimizer)[-1]


def layers(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer, and each one inside of it: wrappers call theirs `optimizer`, those of torch `optim`."""
    found = [optimizer]
    while inside := [
        each
        for name in ("optimizer", "optim")
        if isinstance(each := getattr(found[-1], name, None), Optimizer) and all(each is not other for other in found)
    ]:
        found.append(inside[0])
    return found


def _is_of_torch(kind: type) -> bool:
    return kind is not Optimizer and issubclass(kind, Optimizer) and kind.__module__.startswith("torch.optim.")

"""The state of an optimizer under the plain names of parameters, and back. **Rank-local**.

    layers.0.weight/exp_avg          a tensor: the name of the parameter, and after the last slash the key of its state
    param_groups.5c3f9d1e0a7b2c46    plain data: all else, with names in place of indices

The digest in the second key is that of the names in the groups. So ranks with other parameters, such as the stages of a
pipeline, have entries of their own, and the union of the ranks keeps all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from keepbest.capture.alike import Alike, alike_of, is_split, refuse_a_part
from keepbest.capture.fsdp1 import flat_entries, is_flattened
from keepbest.capture.optimizer_kind import kind_of
from keepbest.errors import ConfigError
from keepbest.modules.kinds import is_dtensor
from keepbest.modules.nested import leaves, spelled
from keepbest.modules.sources import shard_again
from keepbest.modules.wrappers import PlainNames

GROUPS = "param_groups"
_OF_THE_MODEL = ("params", "param_names")  # of a group; the names depend on the wrappers
_OF_TORCH = ("state", "param_groups")  # what each state_dict() of an optimizer has; some have more
_REMEDY = "Make the optimizer of the parameters of the model that the keeper has, after it was wrapped"
_WHOLE_UNIT = (
    "; if it is one, a forward pass has left its unit of FSDP1 whole, as SHARD_GRAD_OP does: evaluate in "
    "torch.no_grad(), and observe after the backward pass"
)


class ParameterNames:
    """The plain names of the parameters of a model, as they are on this rank.

    A tied parameter has several names. The flat parameter of a unit of FSDP1 has those of all that lie in it. One to
    which a `state_dict` of the user's gives another name has that one first, so that it is also the name elsewhere.

    Args:
        model: Model, plain or wrapped.
        states: State dicts with plain keys, of the model or of modules in it, by the path of the module.

    Attributes:
        parameters: Parameter of each first name.
    """

    def __init__(self, model: nn.Module, states: Mapping[str, Mapping[str, Any]]) -> None:
        shard_again(model)  # after a forward pass the parameters may be whole ones, which no optimizer knows
        names = PlainNames(model)
        found = [(names.plain(key), each) for key, each in model.named_parameters(remove_duplicate=False)]
        flat = list(flat_entries(model))
        hidden = {id(entry.flat) for entry in flat} & {id(each) for _, each in found}
        self.parameters: dict[str, torch.Tensor] = {}
        self._first: dict[str, str] = {}
        self._names: dict[int, list[str]] = {}
        own = {id(each): name for name, each in reversed(found) if id(each) not in hidden}
        prefixes = {f"{path}." if path else "": state for path, state in states.items()}
        shown = {prefix + key: id(value) for prefix, state in prefixes.items() for key, value in state.items()}
        renamed = {value: key for key, value in reversed(shown.items())}
        firsts = {each: name if shown.get(name) == each else renamed.get(each, name) for each, name in own.items()}
        if len({*firsts.values()}) < len(firsts):
            firsts = own  # a name of the user's is that of another parameter, which is not in a state dict
        kept = [(name, each) for name, each in found if id(each) in firsts]
        for _, each in kept:
            self._add(firsts[id(each)], firsts[id(each)], each)
        for name, each in kept:
            self._first.setdefault(name, firsts[id(each)])
        for entry in flat:
            if id(entry.flat) in hidden:
                self._add(entry.key, entry.first or entry.key, entry.flat)

    def _add(self, name: str, first: str, parameter: torch.Tensor) -> None:
        self._first[name] = first
        if name == first and name not in self.parameters:
            self.parameters[name] = parameter
            self._names.setdefault(id(parameter), []).append(name)

    def first(self, name: str) -> str | None:
        """The first name of the parameter of this name; `None` if there is none in the model."""
        return self._first.get(name)

    def of_groups(self, optimizer: Optimizer) -> list[list[str]]:
        """The first names in each group of an optimizer. Raises `ConfigError` if a parameter is not in the model."""
        found: list[list[str]] = []
        for number, group in enumerate(optimizer.param_groups):
            found.append([])
            for place, parameter in enumerate(group["params"]):
                if id(parameter) not in self._names:
                    raise ConfigError(
                        f"parameter {place} of group {number} of the optimizer, of shape {list(parameter.shape)}, is "
                        f"no parameter of the model, so it has no name to be kept by. {_REMEDY}"
                        f"{_WHOLE_UNIT if is_flattened(parameter) else ''}"
                    )
                found[-1] += self._names[id(parameter)]
        return found


def group_entries(optimizer: Optimizer, names: ParameterNames) -> dict[str, Any]:
    """The groups of an optimizer, by key. Raises `ConfigError` if it has a parameter that is not in the model."""
    named = names.of_groups(optimizer)
    rest = _rest(optimizer, optimizer.param_groups, named)
    # torch cuts what is no number as it cuts the parameter.
    rest["is_flat"] = True
    rest |= _beside(_state_of(optimizer), is_sharded=True)
    rest["by_element"] = sorted(
        {key for state in optimizer.state.values() for key, value in state.items() if _has_rows(key, value)}
    )
    return {f"{GROUPS}.{_digest(named)}": rest}


def optimizer_entries(optimizer: Optimizer, names: ParameterNames) -> dict[str, Any]:
    """What an optimizer holds, by key: tensors of its parameters, which are its own, and all else as plain data.

    Raises:
        ConfigError: If it has a parameter that is not in the model, or cannot be kept right.
    """
    named = names.of_groups(optimizer)
    state = _state_of(optimizer)
    groups = state["param_groups"]
    if [len(group["params"]) for group in groups] != [len(group) for group in named]:
        raise ConfigError("state_dict() of the optimizer has other groups than the optimizer itself")
    by_index = {
        index: name
        for group, inside in zip(groups, named, strict=True)
        for index, name in zip(group["params"], inside, strict=True)
    }
    entries: dict[str, Any] = {}
    by_element = set[str]()
    rest = _rest(optimizer, groups, named)
    rest |= _beside(state, is_sharded=any(is_split(names.parameters[name]) for name in by_index.values()))
    rest["other"] = {index: values for index, values in state["state"].items() if index not in by_index}
    for index, name in by_index.items():
        of_parameter = state["state"].get(index, {})
        for key, value in of_parameter.items():
            refuse_a_part(name, key, value, names.parameters[name])
            if isinstance(value, torch.Tensor) and isinstance(key, str):
                entries[state_key(name, key)] = value
                if is_dtensor(value):
                    by_element.add(key)
            else:
                rest["state"].setdefault(name, {})[key] = value
    rest["by_element"] = sorted(by_element)
    return {**entries, f"{GROUPS}.{_digest(named)}": rest}


def _state_of(optimizer: Optimizer) -> Mapping[str, Any]:
    """The state dict of an optimizer, with its hooks. It copies no tensor."""
    state = optimizer.state_dict()
    if all(isinstance(state.get(key), kind) for key, kind in zip(_OF_TORCH, (Mapping, list), strict=True)):
        return state
    raise ConfigError(
        f"state_dict() of a {type(optimizer).__name__} has {', '.join(map(repr, state)) or 'nothing'}, and not 'state' "
        "and 'param_groups' as an optimizer of torch has. So it is not known which state belongs to which parameter. "
        "Keep the optimizer that is in it, or leave it out of training_state"
    )


def _beside(state: Mapping[str, Any], *, is_sharded: bool) -> dict[str, Any]:
    """What the state dict of an optimizer of the user's own has beside the groups and the state of parameters."""
    beside = {key: value for key, value in state.items() if key not in _OF_TORCH}
    parts = [
        f"{key!r}{spelled(path)}" for key, value in beside.items() for path, each in leaves(value) if _is_long(each)
    ]
    if is_sharded and parts:
        raise ConfigError(
            f"state_dict() of the optimizer has {parts[0]} beside the state of its parameters, which are sharded. So "
            "it is not known which part of it other ranks hold. Leave the optimizer out of training_state"
        )
    return {"beside": beside} if beside else {}


def _has_rows(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, torch.Tensor) and value.dim() > 0


def _is_long(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() > 1


def _rest(optimizer: Optimizer, groups: list[dict[str, Any]], named: list[list[str]]) -> dict[str, Any]:
    """What is no tensor of a parameter: the kind of the optimizer, options and names of groups, room for the rest."""
    options = [{key: value for key, value in group.items() if key not in _OF_THE_MODEL} for group in groups]
    united = [{**group, "params": inside} for group, inside in zip(options, named, strict=True)]
    return {"kind": kind_of(optimizer), "by_element": [], "param_groups": united, "state": {}, "other": {}}


def state_key(name: str, key: str) -> str:
    """The key of an entry: the name of a parameter, and the key of its state."""
    return f"{name}/{key.replace('%', '%25').replace('/', '%2F')}"


def parameter_of(entry: str) -> tuple[str, str]:
    """The name of the parameter, and the key of its state; the inverse of `state_key`."""
    name, _, key = entry.rpartition("/")
    return name, key.replace("%2F", "/").replace("%25", "%")


def is_groups(entry: str) -> bool:
    """Whether an entry holds what is no tensor of a parameter."""
    return "/" not in entry and entry.startswith(f"{GROUPS}.")


def alike_in(part: str, entries: Mapping[str, Any], names: ParameterNames) -> tuple[str, Alike]:
    """The key of the groups in `optimizer_entries`, and what of these all ranks that hold them must have alike."""
    groups = next(key for key in entries if is_groups(key))
    tensors = ((*parameter_of(key), value) for key, value in entries.items() if not is_groups(key))
    data = ((name, key, value) for name, each in entries[groups]["state"].items() for key, value in each.items())
    return groups, alike_of(part, (each for each in (*tensors, *data) if is_split(names.parameters[each[0]])))


def _digest(groups: list[list[str]]) -> str:
    return hashlib.blake2b(json.dumps(groups).encode(), digest_size=8).hexdigest()

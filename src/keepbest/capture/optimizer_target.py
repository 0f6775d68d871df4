"""How what was saved of an optimizer fits the one of this rank. **Rank-local**."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from keepbest.capture.alike import is_split
from keepbest.capture.contents import Kind, PartContents
from keepbest.capture.fsdp1_optimizer import is_of_units
from keepbest.capture.optimizer import ParameterNames, is_groups, parameter_of
from keepbest.capture.optimizer_kind import HOW, fault_in_shards, fault_of_kind, is_by_element, kind_of, options_for
from keepbest.capture.target_room import laid_out_like
from keepbest.listing import listed
from keepbest.modules.kinds import is_dtensor
from keepbest.modules.nested import leaves

_STEP = "step"  # torch keeps it as a plain number of its own, also where the parameter is sharded
_PARAMS = "params"


@dataclass
class OptimizerTarget:
    """What an optimizer takes of what was saved.

    Attributes:
        optimizer: Optimizer of this rank.
        names: Names of the parameters of the model.
        groups: For each of its groups the options that it takes, and its names. How it computes is its own matter.
        data: State that is no tensor, by the name of the parameter that it belongs to.
        rest: State that belongs to no parameter.
        beside: What its state dict has beside the groups and the state.
        templates: What each stored tensor is to be like, by its key: a sharded parameter, or `None` for a whole tensor.
        faults: What does not fit.
        lacks: Names of parameters that were in the saved optimizer, and are not in the model of this rank.
    """

    optimizer: Optimizer
    names: ParameterNames
    groups: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, dict[Any, Any]] = field(default_factory=dict)
    rest: dict[Any, Any] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict)
    templates: dict[str, torch.Tensor | None] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    lacks: list[str] = field(default_factory=list)
    _by_element: set[str] = field(default_factory=set)  # keys of state whose elements belong to those of parameters

    def compare(self, contents: PartContents, data: Mapping[str, Any]) -> None:
        """Look at what was saved.

        Args:
            contents: What there is.
            data: What of it is no tensor, by its key.

        Raises:
            ConfigError: If the optimizer has a parameter that is not in the model.
        """
        stored = [each for key, each in data.items() if is_groups(key)]
        groups = _united(each["param_groups"] for each in stored)
        if (fault := self._fault(stored, groups)) is not None:
            self.faults.append(fault)
            return
        self.lacks = sorted({name for group in groups for name in group[_PARAMS] if self.names.first(name) is None})
        present = self.names.of_groups(self.optimizer)
        self._match(groups, present)
        self._take_beside(present, stored)
        for each in stored:
            self.rest |= each["other"]
            for name, values in each["state"].items():
                if (here := self.names.first(name)) is not None:
                    self.data.setdefault(here, {}).update(values)
                    self._place_data(here, values)
        self._by_element = {key for each in stored for key in each.get("by_element", ())} | self._seen_to_be(contents)
        for key, kind in contents.kinds.items():
            if not is_groups(key):
                for name in contents.names[key]:
                    self._place(name, kind)

    def _fault(self, stored: list[Mapping[str, Any]], groups: list[dict[str, Any]]) -> str | None:
        """Why nothing of what was saved can be taken, if so."""
        if not stored:
            return "it was not saved from an optimizer"
        if any(map(is_lazy, self.names.parameters.values())):
            return (
                "the model has parameters that are not initialized yet, and the state is compared with them. Load the "
                "weights first, without training_state, and then once more with it"
            )
        kinds = [each["kind"] for each in stored if "kind" in each]
        if (fault := fault_of_kind(self.optimizer, kinds, groups) or fault_in_shards(self.optimizer)) is not None:
            return fault
        kind, is_flat = kind_of(self.optimizer), is_of_units(self.optimizer)
        if kind == "Adafactor" and any(is_flat != each.get("is_flat", False) for each in stored):
            return (
                "Adafactor has other state where FSDP1 makes parameters flat: load it into FSDP1 where it was saved "
                "from FSDP1, and nowhere else"
            )
        present = self.names.of_groups(self.optimizer)
        if kind == "LBFGS" and not any(self._has_order(present, each) for each in stored):
            return (
                "the state of LBFGS belongs to all parameters together, in their order. Make the optimizer of the "
                "parameters that were saved with it, in the same order"
            )
        return None

    def several(self, contents: PartContents) -> list[list[str]]:
        """Keys of stored tensors that are for one place, since their parameters are tied here and were not before."""
        if self.faults:
            return []
        places: dict[tuple[str | None, str], list[str]] = {}
        for key in contents.kinds:
            name, of_state = parameter_of(key)
            if not is_groups(key) and (here := self.names.first(name)) is not None:
                places.setdefault((here, of_state), []).append(key)
        return [keys for keys in places.values() if len(keys) > 1]

    def state_by_name(self, brought: Mapping[str, Any]) -> dict[str, dict[Any, Any]]:
        """The state of each parameter, in tensors of its own.

        Args:
            brought: Stored tensors, by their keys.
        """
        state: dict[str, dict[Any, Any]] = {name: copy.deepcopy(values) for name, values in self.data.items()}
        for key, value in brought.items():
            name, of_state = parameter_of(key)
            if (here := self.names.first(name)) is not None:
                # A copy, since what is read on rank 0 lies in the file.
                state.setdefault(here, {})[of_state] = laid_out_like(value, self.names.parameters[here])
        return state

    def state_dict(self, brought: Mapping[str, Any]) -> dict[str, Any]:
        """What the optimizer loads. Its arguments are those of `state_by_name`."""
        state = self.state_by_name(brought)
        found: dict[str, Any] = {**copy.deepcopy(self.beside), "state": copy.deepcopy(self.rest), "param_groups": []}
        number = 0
        for group in self.groups:
            indices = range(number, number + len(group[_PARAMS]))
            found["state"].update(
                (index, state[name]) for index, name in zip(indices, group[_PARAMS], strict=True) if name in state
            )
            found["param_groups"].append({**copy.deepcopy(group), _PARAMS: list(indices)})
            number = indices.stop
        return found

    def _has_order(self, present: list[list[str]], stored: Mapping[str, Any]) -> bool:
        """Whether what one rank saved is of the same parameters as the optimizer has, in the same order."""
        there = [[self.names.first(name) for name in group[_PARAMS]] for group in stored["param_groups"]]
        return there == present

    def _take_beside(self, present: list[list[str]], stored: list[Mapping[str, Any]]) -> None:
        """Take what an optimizer of the same parameters had beside their state, or else what all had."""
        there = [each for each in stored if each["param_groups"]]
        same = [each for each in there if self._has_order(present, each)]
        found = [each.get("beside", {}) for each in same or there]
        self.beside = found[0] if found else {}
        if any(not _is_same(each, self.beside) for each in found):
            names = sorted({str(key) for each in found for key in each})
            self.faults.append(f"{listed(names)} of its state dict was saved with different values by several ranks")

    def _match(self, stored: list[dict[str, Any]], present: list[list[str]]) -> None:
        """Find for each group what was saved of it. What this rank's model has not is that of other ranks."""
        left = [(group, {here for name in group[_PARAMS] if (here := self.names.first(name))}) for group in stored]
        where = {name: number for number, (_, inside) in enumerate(left) for name in inside}
        free: dict[frozenset[str], list[int]] = {}
        for number in reversed(range(len(left))):  # the first of several with the same names is taken from the end
            free.setdefault(frozenset(left[number][1]), []).append(number)
        for number, names in enumerate(present):
            if same := free.get(frozenset(names)):
                found = same.pop()
                own = self.optimizer.param_groups[number]
                how = {key: own[key] for key in HOW if key in own}
                self.groups.append({**options_for(own, left[found][0]), **how, _PARAMS: names})
            elif names:
                self._explain(number, names, where)
            else:
                self.groups.append({**self.optimizer.param_groups[number], _PARAMS: []})
        if spare := sorted({name for inside, numbers in free.items() if numbers for name in inside}):
            inside_now = {name for names in present for name in names}
            if gone := [name for name in spare if name not in inside_now]:
                self.faults.append(f"it was saved with {listed(gone)}, which the optimizer does not have")

    def _explain(self, number: int, names: list[str], where: Mapping[str, int]) -> None:
        if new := [name for name in names if name not in where]:
            self.faults.append(f"group {number} has {listed(new)}, which were not saved with it")
        else:
            places = sorted({where[name] for name in names})
            self.faults.append(
                f"group {number} has {listed(names)}, which were saved in group "
                f"{' and '.join(map(str, places))}, together with others or apart from each other"
            )

    def _place_data(self, name: str, values: Mapping[Any, Any]) -> None:
        if is_split(self.names.parameters[name]):
            self.faults += [
                f"{key!r} of {name} has inside a tensor of shape {list(each.shape)}, and {name} is sharded: so it is "
                "not known how to share it out"
                for key, value in values.items()
                for _, each in leaves(value)
                if isinstance(each, torch.Tensor) and each.numel() > 1
            ]

    def _is_by_element(self, of_state: str) -> bool:
        return of_state in self._by_element or is_by_element(self.optimizer)

    def _seen_to_be(self, contents: PartContents) -> set[str]:
        """Keys of state that has the shape of its parameter wherever that is no chance."""
        seen, others = set[str](), set[str]()
        for key, kind in contents.kinds.items():
            name, of_state = parameter_of(key)
            here = None if is_groups(key) else self.names.first(name)
            if here is None or kind.form or math.prod(kind.shape) <= 1:
                continue
            shape = tuple(self.names.parameters[here].shape)
            if kind.shape != shape:
                others.add(of_state)
            elif len(shape) > 1 and not _is_square(shape):
                seen.add(of_state)
        return seen - others

    def _place(self, key: str, kind: Kind) -> None:
        name, of_state = parameter_of(key)
        if (here := self.names.first(name)) is None:
            return
        parameter = self.names.parameters[here]
        is_like = kind.shape == tuple(parameter.shape) and of_state != _STEP and not kind.form
        if is_like and is_split(parameter) and _is_square(kind.shape) and not self._is_by_element(of_state):
            self.faults.append(
                f"{key} has the shape of {name}, which is square and sharded, and nothing shows whether its elements "
                "belong to those of the parameter: so it is not known how to share it out. Load it into a model that "
                "is not sharded"
            )
        elif is_like and is_dtensor(parameter):
            self.templates[key] = parameter
        elif is_split(parameter) and math.prod(kind.shape) > 1:
            self.faults.append(
                f"{key} has shape {list(kind.shape)}, and {name} is sharded and has another: so it is not known how "
                "to share it out"
            )
        else:
            self.templates[key] = None


def _is_square(shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and len(set(shape)) == 1


def _united(stored: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The groups that ranks with different parameters saved. Those of one number and with equal options are one."""
    known: dict[int, list[tuple[dict[str, Any], dict[str, None]]]] = {}  # by number; the names are keys, to keep order
    for each in stored:
        for number, group in enumerate(each):
            there = known.setdefault(number, [])
            names = next((names for other, names in there if _has_options_of(other, group)), None)
            if names is None:
                there.append((group, names := {}))
            names.update(dict.fromkeys(group[_PARAMS]))
    return [{**group, _PARAMS: list(names)} for number in sorted(known) for group, names in known[number]]


def _has_options_of(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    keys = one.keys() - {_PARAMS}
    return keys == other.keys() - {_PARAMS} and all(_equal(one[key], other[key]) for key in keys)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def _is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    mine, theirs = list(leaves(one)), list(leaves(other))
    paths = [path for path, _ in mine]
    return paths == [path for path, _ in theirs] and all(
        _equal(each, other_each) for (_, each), (_, other_each) in zip(mine, theirs, strict=True)
    )

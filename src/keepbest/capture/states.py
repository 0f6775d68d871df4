"""The catalogue of training states: what is kept beside the weights, so that training can continue. **Rank-local**."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim import Optimizer

from keepbest.capture.catalogue import Held, Name, data_entry, tensor_entry
from keepbest.capture.fsdp1_optimizer import is_of_units, refuse_units_apart, states_of_units
from keepbest.capture.optimizer import ParameterNames, alike_in, group_entries, optimizer_entries
from keepbest.capture.optimizer_kind import layers, refuse_in_shards
from keepbest.capture.per_rank import PerRank, key_of_rank
from keepbest.capture.schedule_kind import kind_of_schedule
from keepbest.capture.share import Items
from keepbest.errors import ConfigError
from keepbest.ranks import Ranks
from keepbest.run.names import part_name

WHOLE = "state"  # key of what an object gives that is no optimizer, and is the same on every rank
KIND = "kind"  # key beside it of what kind of schedule that was


@runtime_checkable
class Stateful(Protocol):
    """What can be a training state."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Any) -> Any: ...


def check_states(given: object, parts: list[str]) -> dict[str, Stateful]:
    """The training states that a user gave, after a check of their names and kinds.

    Args:
        given: What the user gave; `None` is nothing.
        parts: Names of the parts of the model, which have files of their own.

    Raises:
        ConfigError: If one has no name that can be that of a file, or not what it takes to be saved and loaded.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ConfigError(f'training_state must be a mapping like {{"optimizer": optimizer}}, got {given!r}')
    taken = {part_name(part).casefold(): part for part in parts}
    for name, thing in given.items():
        if not isinstance(name, str) or not name or part_name(name) != name or not all(name.split(".")):
            raise ConfigError(f"training_state: {name!r} is no name; use letters, digits, '_' and '-'")
        if (other := taken.get(name.casefold())) is not None:
            raise ConfigError(f"training_state: {name!r} would have the file of {other!r}; give it another name")
        taken[name.casefold()] = name
        if isinstance(thing, nn.Module):
            raise ConfigError(f"training_state: {name!r} is a module; make it a part of the model of the keeper")
        if isinstance(thing, type) or not isinstance(thing, Stateful):
            raise ConfigError(
                f"training_state: {name!r} is a {type(thing).__name__}, which lacks state_dict or load_state_dict"
            )
        zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
        if zero is not None and _has_inside(thing, zero.ZeroRedundancyOptimizer):
            raise ConfigError(
                f"training_state: {name!r} is a ZeroRedundancyOptimizer, of whose state each rank has a part. "
                "Use FSDP2, which shards the state of any optimizer"
            )
    return dict(given)


def _has_inside(thing: object, kind: type) -> bool:
    return isinstance(thing, Optimizer) and any(isinstance(each, kind) for each in layers(thing))


def add_states(held: Held, items: Items, ranks: Ranks) -> None:
    """Add to `held`, which has the weights of this rank, what its training states hold.

    Of the optimizers of FSDP1 units these are the groups alone: only torch can list the rest, all ranks together.

    Raises:
        ConfigError: If an optimizer cannot be kept right.
    """
    rank = ranks.members[ranks.rank]
    for name, value in _state_values(held, items, ranks):
        if isinstance(value, torch.Tensor):
            entry = tensor_entry(value, "state", held.meshes, is_frozen=False)
        else:
            entry = data_entry(is_frozen=False)
        if not entry.members or rank in entry.members:
            held.entries[name], held.values[name] = entry, value


def marks_of_states(items: Items) -> Iterator[Any]:
    """Tensors and plain data that show whether the training states of this rank have changed."""
    for thing in items.training_state.values():
        if isinstance(thing, Optimizer):
            yield from (value for values in thing.state.values() for value in dict(values).values())
            yield [{key: value for key, value in group.items() if key != "params"} for group in thing.param_groups]
        else:
            yield thing.state_dict()


def _state_values(held: Held, items: Items, ranks: Ranks) -> Iterator[tuple[Name, Any]]:
    names: ParameterNames | None = None
    for part, thing in items.training_state.items():
        try:
            if isinstance(thing, Optimizer):
                refuse_in_shards(thing)
                names = names or ParameterNames(items.model, held.states)
                if is_of_units(thing):
                    refuse_units_apart(items.model, ranks.members)
                    entries = group_entries(thing, names)
                    held.alike.update(
                        (Name(part, key), states_of_units(part, thing, items.model, names)) for key in entries
                    )
                else:
                    entries = optimizer_entries(thing, names)
                    if ranks.world_size > 1:
                        groups, alike = alike_in(part, entries, names)
                        held.alike[Name(part, groups)] = alike
            elif isinstance(thing, PerRank):
                entries = {key_of_rank(ranks.rank): thing.state_dict()}
            else:
                kind = kind_of_schedule(thing)
                entries = {WHOLE: thing.state_dict(), **({} if kind is None else {KIND: kind})}
        except ConfigError as error:
            raise ConfigError(f"training_state {part!r}: {error}") from error
        yield from ((Name(part, key), value) for key, value in entries.items())

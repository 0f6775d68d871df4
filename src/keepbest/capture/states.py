"""The catalogue of training states: what is kept beside the weights, so that training can continue. **Rank-local**."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim import Optimizer

from keepbest.capture.catalogue import Entry, Held, Name, data_entry, tensor_entry
from keepbest.capture.optimizer import ParameterNames, optimizer_entries
from keepbest.capture.per_rank import PerRank, key_of_rank
from keepbest.capture.share import Items
from keepbest.errors import ConfigError
from keepbest.run.names import part_name

WHOLE = "state"  # key of what an object gives that is no optimizer, and is the same on every rank


@runtime_checkable
class Stateful(Protocol):
    """Whatever can be a training state."""

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
    return dict(given)


def add_states(held: Held, items: Items, rank: int, keeper_rank: int) -> None:
    """Add to `held` what the training states of this rank hold.

    Args:
        held: What this rank holds of the weights.
        items: What is saved.
        rank: This rank in the default group.
        keeper_rank: This rank among those of the keeper.

    Raises:
        ConfigError: If an optimizer cannot be kept right.
    """
    for name, value in state_values(items, keeper_rank):
        entry = _entry_of(value) if isinstance(value, torch.Tensor) else data_entry(is_frozen=False)
        if not entry.members or rank in entry.members:
            held.entries[name], held.values[name] = entry, value


def state_values(items: Items, keeper_rank: int) -> Iterator[tuple[Name, Any]]:
    """What the training states hold, as it is now."""
    names: ParameterNames | None = None
    for part, thing in items.training_state.items():
        try:
            if isinstance(thing, Optimizer):
                names = names or ParameterNames(items.model)
                entries = optimizer_entries(thing, names)
            elif isinstance(thing, PerRank):
                entries = {key_of_rank(keeper_rank): thing.state_dict()}
            else:
                entries = {WHOLE: thing.state_dict()}
        except ConfigError as error:
            raise ConfigError(f"training_state {part!r}: {error}") from error
        yield from ((Name(part, key), value) for key, value in entries.items())


def _entry_of(value: torch.Tensor) -> Entry:
    return tensor_entry(value, "state", is_frozen=False)

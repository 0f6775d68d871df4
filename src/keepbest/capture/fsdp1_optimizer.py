"""Optimizers of FSDP1 units, of which only torch knows how their state lies in flat shards. **Collective**."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from keepbest.capture.alike import Alike
from keepbest.capture.catalogue import Name
from keepbest.capture.fsdp1 import FlatEntry, cut_in_other_order, flat_entries, is_flattened, other_ranks_of_units
from keepbest.capture.optimizer import GROUPS, ParameterNames, state_key
from keepbest.capture.share import Items
from keepbest.errors import ConfigError
from keepbest.modules.kinds import is_fsdp1
from keepbest.modules.quiet import quiet
from keepbest.modules.wrappers import PlainNames
from keepbest.ranks import Ranks

_REMEDY = "Use FSDP2, or leave the optimizer out of training_state"


def is_of_units(thing: object) -> bool:
    """Whether an optimizer has parameters in units of FSDP1. **Rank-local**."""
    if not isinstance(thing, Optimizer):
        return False
    return any(is_flattened(parameter) for group in thing.param_groups for parameter in group["params"])


def refuse_units_apart(model: nn.Module, members: list[int]) -> None:
    """Check that torch can put the state of the units of a model together on these ranks. **Rank-local**.

    Raises:
        ConfigError: If units are sharded over some of them, or are of two kinds.
    """
    if (found := other_ranks_of_units(model, members)) is not None:
        raise ConfigError(
            f"the state of an optimizer of FSDP1 cannot be kept where units are sharded over ranks {found} of "
            f"{members}. {_REMEDY}"
        )
    if len({getattr(inside, "_fsdp_use_orig_params", None) for inside in model.modules()} - {None}) > 1:
        raise ConfigError(
            "the state of an optimizer of FSDP1 cannot be kept where units differ in use_orig_params. Use one of both"
        )


def states_of_units(part: str, optimizer: Optimizer, model: nn.Module, names: ParameterNames) -> Alike:
    """What an optimizer of units has, which torch expects to find alike on every rank. **Rank-local**.

    Args:
        part: Name of the training state.
        optimizer: Optimizer.
        model: Model of it.
        names: Names of the parameters of the model.

    Raises:
        ConfigError: If torch could not put the state together: some of a unit has none, or it is nested.
    """
    unit_of = {entry.key: id(entry.flat) for entry in flat_entries(model)}
    firsts: dict[int, str] = {}
    found: dict[str, dict[str, set[str]]] = {}
    for name, parameter in names.parameters.items():
        state = optimizer.state.get(parameter, {})
        _refuse_nested(name, state, parameter)
        if name not in unit_of:
            unit = f"{name!r}"
        else:
            unit = f"the unit of FSDP1 with {firsts.setdefault(unit_of[name], name)!r}"
            if parameter.numel() == 0 or not (parameter.requires_grad or state):
                continue  # it lies on other ranks, or is frozen
        found.setdefault(unit, {})[name] = {str(key) for key in state}
    for unit, each in found.items():
        have = [name for name, keys in each.items() if keys]
        if have and len(have) < len(each):
            lacking = next(name for name, keys in each.items() if not keys)
            raise ConfigError(
                f"the optimizer has state for {have[0]!r}, and none for {lacking!r}, which is in {unit}: torch "
                "cannot put the state of a part of a unit together. Make one optimizer of all parameters of the "
                "unit, give each of them a gradient at each step, or set requires_grad=False on those without one"
            )
    return {
        f"the keys of the state of the optimizer {part!r} for {unit}": " ".join(sorted(set().union(*each.values())))
        for unit, each in found.items()
    }


def _refuse_nested(name: str, state: Mapping[Any, Any], parameter: torch.Tensor) -> None:
    for key, value in state.items():
        is_of_rows = isinstance(value, torch.Tensor) and value.dim() > 0
        if isinstance(value, Mapping | list | tuple | set) or (is_of_rows and value.shape != parameter.shape):
            found = f"of shape {list(value.shape)}" if is_of_rows else f"a {type(value).__name__}"
            raise ConfigError(
                f"{key!r} of the optimizer for {name!r} is {found}, which is not like the parameter, whose shard here "
                f"has shape {list(parameter.shape)}: torch cannot put it together from the shards of FSDP1. {_REMEDY}"
            )


def unit_states(items: Items, ranks: Ranks, *, is_whole: bool) -> Iterator[tuple[Name, Any]]:
    """The state of the parameters of all optimizers of FSDP1 units. **Collective**.

    Args:
        items: What is saved.
        ranks: Ranks of the model.
        is_whole: Whether rank 0 gets whole tensors on the CPU, and the others nothing. Else each rank gets its shards,
            and rank 0 alone what is not sharded.
    """
    for part, thing in items.training_state.items():
        if is_of_units(thing):
            with _states(items.model, is_whole=is_whole, rank0_only=is_whole):
                state = _fsdp().optim_state_dict(items.model, thing, group=ranks.process_group)
            plain = PlainNames(items.model).plain
            by_name = {plain(name): values for name, values in state.get("state", {}).items()}
            yield from ((Name(part, key), value) for key, value in _entries(by_name).items())


def _entries(state: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    data: dict[str, dict[str, Any]] = {}
    for name, values in state.items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                entries[state_key(name, key)] = value
            else:
                data.setdefault(name, {})[key] = value
    if data:
        entries[f"{GROUPS}.state"] = {"param_groups": [], "state": data, "other": {}}
    return entries


def unit_state_to_load(
    model: nn.Module,
    optimizer: Optimizer,
    state: Mapping[str, Mapping[Any, Any]],
    groups: Iterable[Mapping[str, Any]],
    ranks: Ranks,
) -> dict[str, Any]:
    """What an optimizer of FSDP1 units loads on this rank. **Collective**.

    Args:
        model: Model of the optimizer.
        optimizer: Optimizer that is to load it.
        state: Whole state of each parameter, by its plain name; the same on every rank.
        groups: For each group its options, and its names under `params`.
        ranks: Ranks of the model.
    """
    key = PlainNames(model).key
    in_other_order = {each.key: each for each in cut_in_other_order(model)}
    whole = {
        "state": {
            key(name): {each: _as_in_memory(value, in_other_order.get(name)) for each, value in values.items()}
            for name, values in state.items()
        },
        "param_groups": [{**group, "params": [key(name) for name in group["params"]]} for group in groups],
    }
    with _states(model, is_whole=True, rank0_only=False):
        found: dict[str, Any] = _fsdp().optim_state_dict_to_load(model, optimizer, whole, group=ranks.process_group)
    return found


def _as_in_memory(value: Any, entry: FlatEntry | None) -> Any:
    """State with its elements in the order in which those of its parameter lie in the flat one.

    torch cuts the parameter in that order, and what is loaded as its state row by row.
    """
    if entry is None or not isinstance(value, torch.Tensor) or value.shape != entry.shape:
        return value
    laid_out = torch.empty_strided(entry.shape, entry.stride, dtype=value.dtype, device=value.device).copy_(value)
    return laid_out.as_strided((value.numel(),), (1,)).view(entry.shape)


def _fsdp() -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel


@contextmanager
def _states(model: nn.Module, *, is_whole: bool, rank0_only: bool) -> Iterator[None]:
    """State dicts of optimizers are whole, or sharded, in this block."""
    from torch.distributed.fsdp import (
        FullOptimStateDictConfig,
        FullStateDictConfig,
        ShardedOptimStateDictConfig,
        ShardedStateDictConfig,
        StateDictType,
    )

    settings: tuple[Any, ...] = (
        StateDictType.SHARDED_STATE_DICT,
        ShardedStateDictConfig(),
        ShardedOptimStateDictConfig(offload_to_cpu=False),
    )
    # On the CPU torch gathers into one buffer, which `offload_to_cpu` would not copy: all state would be the last one.
    devices = [unit.compute_device for unit in model.modules() if is_fsdp1(unit)]
    is_elsewhere = any(device is not None and device.type != "cpu" for device in devices)
    if is_whole:
        settings = (
            StateDictType.FULL_STATE_DICT,
            FullStateDictConfig(),
            FullOptimStateDictConfig(rank0_only=rank0_only, offload_to_cpu=is_elsewhere),
        )
    # Deprecated, but what is to replace it steps an optimizer that has no state yet.
    with quiet(), _fsdp().state_dict_type(model, *settings):
        yield

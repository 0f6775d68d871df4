"""State dicts of modules with FSDP1 units, of which only torch knows how their parameters lie in flat shards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from keepbest.errors import ConfigError, SnapshotError
from keepbest.listing import listed
from keepbest.modules.kinds import has_shards, is_dtensor, is_fsdp1
from keepbest.modules.quiet import quiet, quiet_about_missing_shards
from keepbest.modules.sources import Source, StateDict, plain_state_dict
from keepbest.modules.state_dicts import state_dict_of
from keepbest.modules.wrappers import PlainNames, walk, wrapper_of

_CHANGED_OUTSIDE = (
    "of a unit of FSDP1 is changed by a hook or override of state_dict() of a module around the unit, which would need "
    "all of the model at once. Register the hook on the module that FSDP1 wraps, or use FSDP2"
)


def fsdp1_state_dict(
    source: Source, take: Callable[[str, torch.Tensor], torch.Tensor | None], *, rank0_only: bool = True
) -> StateDict:
    """State dict, with plain keys, of a source that is, or contains, FSDP1 units. **Collective**.

    No more than one gathered unit is held at a time. What is in no unit is there on every rank, as the module holds it.

    Args:
        source: Source in the model.
        take: Function of a plain key and the full parameter of a unit, which is gone after the call. Ranks other than 0
            pass what they have of it. It returns the tensor that stands for the parameter in the state dict, and for
            those that are tied to it; `None` if it need not be there.
        rank0_only: Whether the parameters of the units are in the state dict of rank 0 alone.
    """
    module, names = source.module, source.names
    taken: StateDict = {}

    def take_unit(inside: nn.Module, state: StateDict, prefix: str, _: dict[str, Any]) -> None:
        tied: dict[int, torch.Tensor | None] = {}
        names_inside = PlainNames(inside)
        for name, parameter in inside.named_parameters(remove_duplicate=False):
            key = prefix + names_inside.key(names_inside.plain(name))
            plain = names.plain(key)
            # Those of units in this one are taken already; DTensors are none of FSDP1's, and stay.
            if plain not in taken and key in state and not is_dtensor(parameter):
                if tied.get(id(parameter)) is None:
                    tied[id(parameter)] = take(plain, state[key])
                taken[plain] = tied[id(parameter)]
                # FSDP1 wants to find each key, and clones what it finds.
                state[key] = state[key].new_empty(0).as_subclass(_Taken)

    with full_fsdp1_state(module, rank0_only=rank0_only), _hooks_in_units(module, take_unit):
        state = state_dict_of(module)
    plain_state = names.plain_state(state)
    for key, value in plain_state.items():
        if (key in taken) != isinstance(value, _Taken):
            raise SnapshotError(f"{key!r} {_CHANGED_OUTSIDE}")
    return {key: taken.get(key, value) for key, value in plain_state.items()}


_KEEPING_VALUES = (torch.Tensor.clone, torch.Tensor.detach, torch.Tensor.cpu, torch.Tensor.contiguous)


class _Taken(torch.Tensor):
    """Stands for a full parameter that is gone, so that hooks of modules around its unit cannot compute with it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made: object = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]  # of torch
        if isinstance(made, torch.Tensor) and func not in _KEEPING_VALUES:
            raise SnapshotError(f"a weight {_CHANGED_OUTSIDE}")
        return made


def has_own_state_dict(source: Source) -> bool:
    """Whether a module of the user's in a source with FSDP1 units has a state dict of its own. **Rank-local**."""
    return source.holds_fsdp1 and any(map(_changes_state_dict, source.module.modules()))


def check_own_state_dict(source: Source, keys: Iterable[str]) -> None:
    """Check that what is to be kept of the FSDP1 units in a source is in its state dict. **Collective**.

    What a state dict of the user's own has is known only from a call.

    Args:
        source: Source in the model.
        keys: Plain keys of what is to be kept of the units.

    Raises:
        ConfigError: If something is missing there, or changed by a module around its unit.
    """
    if not source.holds_fsdp1:
        return
    try:
        state = fsdp1_state_dict(source, lambda *_: None, rank0_only=False)
    except (AssertionError, KeyError) as error:
        raise ConfigError(f"FSDP1 does not find its weights there ({error}). {_OWN_STATE_DICT}") from error
    except SnapshotError as error:
        raise ConfigError(str(error)) from error
    if missing := [key for key in keys if key not in state]:
        raise ConfigError(f"the state dict lacks {listed(missing)}. {_OWN_STATE_DICT}")


_OWN_STATE_DICT = (
    "A state_dict() of the model's own, or a hook on it, leaves out or renames weights, which cannot be kept beside "
    "units of FSDP1. Use FSDP2, leave the names as they are, or name what is to be kept (model_names)"
)


def _changes_state_dict(module: nn.Module) -> bool:
    known = nn.Module.state_dict, nn.Module._save_to_state_dict  # noqa: SLF001  # torch's own protocol
    hooks = module._state_dict_hooks.values()  # noqa: SLF001  # torch has no public list of them
    methods = (getattr(type(module), name) for name in ("state_dict", "_save_to_state_dict"))
    own = [each for each in (*methods, *hooks) if each not in known]
    if is_fsdp1(module) or wrapper_of(module) is not None:
        # These have hooks of torch, which change names that `PlainNames` knows. A user may have added others.
        own = [each for each in own if not str(getattr(each, "__module__", "")).startswith("torch.")]
    return bool(own) or "state_dict" in vars(module)


class FlatEntry(NamedTuple):
    """A parameter of the user that lies in the flat parameter of a unit.

    Attributes:
        key: Plain key in the module.
        shape: Shape of the whole parameter.
        first: Plain key of the parameter that it is one with; empty if it is the first of its names.
        flat: Flat parameter of the unit, as this rank has it.
        members: Ranks in the default group that share the flat parameter out among them; empty if each has all of it.
        stride: Stride of the whole parameter, by which its elements lie in the flat one.
    """

    key: str
    shape: tuple[int, ...]
    first: str
    flat: torch.Tensor
    members: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def lies_in_rows(self) -> bool:
        """Whether its elements lie row by row: those of channels_last do not."""
        return torch.empty_strided(self.shape, self.stride, device="meta").is_contiguous()


def flat_entries(module: nn.Module) -> Iterator[FlatEntry]:
    """What lies in the flat parameters of the FSDP1 units of `module`, from what torch notes of it. **Rank-local**."""
    seen: dict[tuple[int, str], str] = {}  # a unit may have several paths
    for path, unit in walk(module):
        if not is_fsdp1(unit) or unit._handle is None:  # noqa: SLF001  # torch has no public way to what lies in a unit
            continue
        # Of the unit, not of `unit.module`: that leaves out a wrapper, whose name is in what torch notes.
        handle, names, prefix = unit._handle, PlainNames(unit), f"{path}." if path else ""  # noqa: SLF001  # as above
        flat, is_split = handle.flat_param, handle.uses_sharded_strategy
        members = tuple(dist.get_process_group_ranks(unit.process_group)) if is_split else ()
        shapes: dict[str, tuple[int, ...]] = {}
        strides: dict[str, tuple[int, ...]] = {}
        firsts: dict[str, str] = {}
        for name, shape, stride in zip(flat._fqns, flat._shapes, flat._strides, strict=True):  # noqa: SLF001  # as above
            key = prefix + names.plain(name)
            shapes[key], strides[key] = tuple(shape), tuple(stride)
            firsts[key] = seen.setdefault((id(flat), name), key)
            first = "" if firsts[key] == key else firsts[key]
            yield FlatEntry(key, shapes[key], first, flat, members, strides[key])
        for shared in flat._shared_param_infos:  # noqa: SLF001  # as above
            name, first = (
                prefix + names.plain(f"{where}.{what}" if where else what)
                for where, what in (
                    (shared.module_name, shared.param_name),
                    (shared.prim_module_name, shared.prim_param_name),
                )
            )
            yield FlatEntry(name, shapes[first], firsts[first], flat, members, strides[first])


def cut_in_other_order(module: nn.Module) -> Iterator[FlatEntry]:
    """What lies in the units of `module` in pieces, and not row by row. **Rank-local**.

    Original parameters of a unit that is not sharded are not cut, and have their state as they are.
    """
    registered = {id(parameter) for parameter in module.parameters()}
    cut = (each for each in flat_entries(module) if each.members or id(each.flat) in registered)
    return (each for each in cut if not each.lies_in_rows)


def other_ranks_of_units(module: nn.Module, members: list[int]) -> list[int] | None:
    """The ranks, other than `members`, over which a unit of FSDP1 is sharded; `None` if there is no such unit."""
    groups = (unit.process_group for unit in module.modules() if is_fsdp1(unit))
    ranks = (dist.get_process_group_ranks(group) for group in groups if isinstance(group, dist.ProcessGroup))
    return next((each for each in ranks if each != members), None)


def is_flattened(parameter: object) -> bool:
    """Whether a parameter is, or lies in, the flat parameter of an FSDP1 unit."""
    return bool(getattr(parameter, "_fsdp_flattened", False))


@contextlib.contextmanager
def full_fsdp1_state(module: nn.Module, *, rank0_only: bool) -> Iterator[None]:
    """State dicts of `module` hold full tensors in this block, also of the FSDP1 units in it."""
    from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType

    # Deprecated, but what is to replace it leaves the full weights on every rank.
    config = FullStateDictConfig(rank0_only=rank0_only)
    with quiet(), FullyShardedDataParallel.state_dict_type(module, StateDictType.FULL_STATE_DICT, config):
        yield


def sharded_state_dict(source: Source) -> StateDict:
    """What this rank holds of a source's state dict, with plain keys. **Collective** where it holds FSDP1 units.

    Names of one parameter have one value.
    """
    if not source.holds_fsdp1:
        return plain_state_dict(source)
    tied: dict[str, str] = {}

    def tie_unit(inside: nn.Module, state: StateDict, prefix: str, _: dict[str, Any]) -> None:
        # The parameters of the unit are whole at this moment, so that those with several names can be seen.
        first: dict[int, str] = {}
        names_inside = PlainNames(inside)
        for name, parameter in inside.named_parameters(remove_duplicate=False):
            key = prefix + names_inside.key(names_inside.plain(name))
            plain = source.names.plain(key)
            if first.setdefault(id(parameter), plain) != plain:
                tied[plain] = first[id(parameter)]
            if key in state and not has_shards(state[key]):  # those of units in this one are shards already
                state[key] = state[key].contiguous()  # torch makes no shards of another order, such as channels_last

    with sharded_fsdp1_state(source.module), _hooks_in_units(source.module, tie_unit):
        state = state_dict_of(source.module)
    plain_state = source.names.plain_state(state)
    # FSDP1 makes a shard for each name.
    return {**plain_state, **{key: plain_state[first] for key, first in tied.items() if key in plain_state}}


@contextlib.contextmanager
def _hooks_in_units(
    module: nn.Module, hook: Callable[[nn.Module, StateDict, str, dict[str, Any]], None]
) -> Iterator[None]:
    """Call `hook` in this block when the state dict of what an FSDP1 unit wraps is complete, and not yet sharded."""
    with contextlib.ExitStack() as hooks:
        for unit in module.modules():
            if is_fsdp1(unit):
                # On the module inside: a hook on the unit would run after FSDP1's own, which clones the parameters.
                handle = unit.module.register_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]
                hooks.callback(handle.remove)
        yield


@contextlib.contextmanager
def sharded_fsdp1_state(module: nn.Module) -> Iterator[None]:
    """State dicts of `module` hold shards in this block, also of the FSDP1 units in it."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardedStateDictConfig, StateDictType

    with quiet(), quiet_about_missing_shards():
        config = ShardedStateDictConfig(offload_to_cpu=False)
        with FullyShardedDataParallel.state_dict_type(module, StateDictType.SHARDED_STATE_DICT, config):
            yield

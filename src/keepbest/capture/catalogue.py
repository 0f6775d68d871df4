"""The catalogue: what this rank holds of the weights that are to be saved, key by key. **Rank-local**."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from keepbest.capture.alike import Alike
from keepbest.capture.contents import EXTRA_STATE, is_extra_state
from keepbest.capture.fsdp1 import FlatEntry, flat_entries, is_flattened
from keepbest.capture.share import Items
from keepbest.capture.versions import versions_of
from keepbest.formats.tied import identity_of
from keepbest.modules.kinds import PLAIN_CLASSES, is_dtensor
from keepbest.modules.sources import Source, StateDict, list_sources, plain_state_dict
from keepbest.modules.state_dicts import Version

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_IN_UNIT = "in a unit of FSDP1"

Meshes = dict[int, tuple[tuple[int, ...], str]]
"""By the id of a mesh its ranks, in the default group, and its shape in words."""
Role = Literal["parameter", "buffer", "data", "state"]


class Name(NamedTuple):
    """The name of an entry: the part that it is in, and its key there."""

    part: str
    key: str

    def __str__(self) -> str:
        return self.key if self.part == "model" else f"{self.key} of {self.part}"


class Form(NamedTuple):
    """What all ranks that hold an entry must have in common.

    Attributes:
        role: Whether it is a parameter, another tensor of the model, no tensor, or a tensor of a training state.
        shape: Shape of the whole tensor.
        dtype: Its dtype.
        layout: Its layout, or `quantized`; empty where it is no tensor.
        spread: How it is shared out among ranks; empty if each rank has all of it.
        is_frozen: Whether it is left out, as frozen weights are if they are not to be saved.
    """

    role: Role
    shape: tuple[int, ...]
    dtype: str
    layout: str
    spread: str
    is_frozen: bool

    @property
    def is_in_unit(self) -> bool:
        """Whether it is a parameter in a unit of FSDP1."""
        return self.spread.startswith(_IN_UNIT)

    @property
    def is_packed(self) -> bool:
        """Whether it is no row of values in memory, so that no room for it can be made beforehand."""
        return self.layout != "strided"

    def __str__(self) -> str:
        frozen = " that is frozen" if self.is_frozen else ""
        if self.role == "data":
            return f"an extra state{frozen}"
        spread = f", {self.spread}" if self.spread else ""
        return f"a {self.role} of shape {list(self.shape)}, {self.dtype}, {self.layout}{spread}{frozen}"


class Entry(NamedTuple):
    """What this rank holds under a name.

    Attributes:
        form: What all ranks that hold it must have in common.
        members: Ranks in the default group among which it is shared out; empty if each rank has all of it.
        device: Type of the device that it is on.
        first: Key, in the same part, of the tensor that it is one with; empty if it is the first of its names.
    """

    form: Form
    members: tuple[int, ...]
    device: str
    first: str


@dataclass(frozen=True, slots=True)
class Held:
    """What this rank holds at one moment.

    Attributes:
        sources: Modules that hold the parts.
        states: For each source without FSDP1, by its path, its state dict. Its tensors are those of the model.
        meshes: Meshes of its tensors.
        entries: What there is, in the order of the state dicts.
        values: Value of each entry, as this rank has it: for a parameter in an FSDP1 unit the flat one.
        alike: For the groups of each optimizer what all ranks that hold them must have alike beside the shards.
        versions: Versions of its modules that are recorded, by the part and the path of the module there.
    """

    sources: list[Source]
    states: dict[str, StateDict] = field(default_factory=dict)
    meshes: Meshes = field(default_factory=dict)
    entries: dict[Name, Entry] = field(default_factory=dict)
    values: dict[Name, Any] = field(default_factory=dict)
    alike: dict[Name, Alike] = field(default_factory=dict)
    versions: dict[Name, Version] = field(default_factory=dict)


def look(items: Items, rank: int) -> Held:
    """List what this rank, `rank` in the default group, holds of `items`.

    Raises:
        ConfigError: If a part is no longer in the model.
    """
    held = Held(list_sources(items.model, items.parts, save_frozen_weights=items.save_frozen_weights))
    for source in held.sources:
        flat: dict[str, FlatEntry] = {}
        if source.holds_fsdp1:
            flat = {entry.key: entry for entry in flat_entries(source.module)}
            state = state_beside(source) | {key: entry.flat for key, entry in flat.items()}
        else:
            state = held.states[source.path] = plain_state_dict(source)
        _add(held, source, state, flat, rank)
        held.versions.update({Name(part.name, path): each for (part, path), each in versions_of(source).items()})
    return held


def state_beside(source: Source) -> StateDict:
    """What a source with FSDP1 units holds beside their flat parameters, without a collective."""
    state: StateDict = {}
    for path, inner in source.module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        own: dict[str, Any] = {**dict(inner.named_parameters(recurse=False)), **_persistent_buffers(inner)}
        if has_extra_state(inner):
            own[EXTRA_STATE] = inner.get_extra_state()
        state |= {prefix + key: value for key, value in own.items() if not is_flattened(value)}
    return source.names.plain_state(state)


def stored_tensors(module: nn.Module, *, with_frozen: bool) -> Iterator[torch.Tensor]:
    """The parameters of a module and the buffers that its state dict has, as this rank holds them; no hook runs."""
    yield from (parameter for parameter in module.parameters() if with_frozen or parameter.requires_grad)
    for inner in module.modules():
        yield from _persistent_buffers(inner).values()


def extra_states(module: nn.Module) -> Iterator[object]:
    """The extra states of a module and those below; no hook runs."""
    yield from (inner.get_extra_state() for inner in module.modules() if has_extra_state(inner))


def has_extra_state(module: nn.Module) -> bool:
    """Whether a module keeps something beside its weights. **Rank-local**."""
    return type(module).get_extra_state is not nn.Module.get_extra_state


def _persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    passing = module._non_persistent_buffers_set  # noqa: SLF001  # torch has no other list of them
    return {key: value for key, value in module.named_buffers(recurse=False) if key not in passing}


def _add(held: Held, source: Source, state: StateDict, flat: dict[str, FlatEntry], rank: int) -> None:
    firsts: dict[tuple[str, bool, Hashable], str] = {}  # a tensor that is kept is none that is left out
    for part in source.parts:
        is_whole = not source.path_of(part) and not part.apart
        for key, value in state.items():
            inside = key if is_whole else source.key_in(part, key)
            if inside is None:
                continue
            role: Role = "parameter" if key in flat or source.is_parameter(key, value) else "buffer"
            entry = _entry_of(source, key, value, role, held.meshes, flat.get(key))
            if entry.members and rank not in entry.members:
                continue  # a DTensor whose mesh this rank is not in: it holds nothing of it
            if key in flat:
                first = source.key_in(part, flat[key].first) if flat[key].first else None
            else:
                place = _identity(inside, value) if entry.form.role != "data" else inside
                first = firsts.setdefault((part.name, entry.form.is_frozen, place), inside)
            name = Name(part.name, inside)
            held.entries[name] = entry if first in (None, inside) else entry._replace(first=first)
            held.values[name] = value


def _identity(key: str, value: torch.Tensor) -> Hashable:
    """What two keys of one tensor have in common."""
    has_place = type(value) in PLAIN_CLASSES and not value.is_nested  # others may not say where they lie
    return identity_of(key, value) if has_place else id(value)


def _entry_of(source: Source, key: str, value: Any, role: Role, meshes: Meshes, flat: FlatEntry | None) -> Entry:
    is_frozen = source.is_frozen(key, value)
    if is_extra_state(key) or not isinstance(value, torch.Tensor):
        return data_entry(is_frozen=is_frozen)
    return tensor_entry(value, role, meshes, is_frozen=is_frozen, flat=flat)


def data_entry(*, is_frozen: bool) -> Entry:
    """The entry of what is no tensor."""
    return Entry(Form("data", (), "", "", "", is_frozen), (), "cpu", "")


def tensor_entry(
    value: torch.Tensor, role: Role, meshes: Meshes, *, is_frozen: bool, flat: FlatEntry | None = None
) -> Entry:
    """The entry of a tensor, or of what lies in the flat parameter of a unit of FSDP1.

    `meshes` has the meshes that were seen before, and gets those that were not.
    """
    is_plain = flat is None and type(value) in PLAIN_CLASSES
    if is_plain and value.layout == torch.strided and not (value.is_nested or value.is_quantized):
        return _dense_entry(role, value.shape, value.dtype, value.device.type, is_frozen)
    shape: tuple[int, ...] = ()
    spread, members = "", tuple[int, ...]()
    if flat is not None:
        shape, members = flat.shape, flat.members
        spread = f"{_IN_UNIT} over {len(members)} ranks"
    elif not is_lazy(value) and not value.is_nested:
        shape = tuple(value.shape)
    if is_dtensor(value):
        members, over = _mesh_of(value, meshes)
        spread = f"{tuple(value.placements)} over {over} ranks"
    layout = _word(value.layout)
    if value.is_quantized or value.is_nested:
        layout = "quantized" if value.is_quantized else "nested"
    form = Form(role, shape, _word(value.dtype), layout, spread, is_frozen)
    return Entry(form, members, value.device.type, "")


def _mesh_of(value: DTensor, known: Meshes) -> tuple[tuple[int, ...], str]:
    """The ranks of a mesh, and its shape in words. torch makes the tensor of its ranks anew each time."""
    mesh = value.device_mesh
    if id(mesh) not in known:
        ranks = mesh.mesh
        known[id(mesh)] = tuple(ranks.flatten().tolist()), " x ".join(map(str, ranks.shape))
    return known[id(mesh)]


@lru_cache(maxsize=1024)
def _dense_entry(role: Role, shape: torch.Size, dtype: torch.dtype, device: str, is_frozen: bool) -> Entry:
    """One entry for all tensors of a kind: a model may have thousands of each."""
    return Entry(Form(role, tuple(shape), _word(dtype), "strided", "", is_frozen), (), device, "")


@cache
def _word(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")

"""Tensors that a module itself brings to the shape that was saved, as observers and memory banks do. **Rank-local**."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from keepbest.capture.contents import Kind
from keepbest.capture.versions import RecordedVersions, saved_versions
from keepbest.modules.kinds import has_shards, is_dense
from keepbest.modules.parts import Part
from keepbest.modules.sources import Source
from keepbest.modules.state_dicts import versioned_for
from keepbest.modules.wrappers import walk, wrapper_of


def resized(
    source: Source, part: Part, saved: Mapping[str, Kind], present: Mapping[str, Any], versions: RecordedVersions
) -> set[str]:
    """The keys of a part whose values have another shape than what the model has, and that their module takes as such.

    Only a module whose class has a `_load_from_state_dict` of its own can do that. It is tried on a copy of the module
    without its children, so that the model is untouched whether it does or not.

    Args:
        source: Source that has the part. In one with units of FSDP1 nothing is tried.
        part: Part of the model.
        saved: Kind of each value that is to be loaded, by its key in the part.
        present: What the model has in their place.
        versions: Recorded versions of the modules.
    """
    both = saved.keys() & present.keys()
    differing = {key for key in both if _are_dense(saved[key], present[key]) and saved[key].shape != present[key].shape}
    if not differing or source.holds_fsdp1:
        return set()
    inside, taken = source.path_of(part), set[str]()
    then = saved_versions(source, versions, (inside + key for key in both))
    for path, module in walk(source.module):
        if wrapper_of(module) is not None or not _loads_by_itself(module):
            continue
        prefix = f"{path}." if path else ""
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        keys = {name: key for name, _ in own if (key := source.key_in(part, prefix + name)) is not None}
        kinds = {name: saved[key] for name, key in keys.items() if key in both and _are_dense(saved[key], present[key])}
        mine = {name: keys[name] for name in kinds if keys[name] in differing}
        if mine and _takes(module, kinds, then.get(path)):
            taken.update(mine.values())
    return taken


def _are_dense(saved: Kind, present: object) -> bool:
    """Whether both are dense tensors with a shape, that no other rank has a part of."""
    is_plain = is_dense(present) and not has_shards(present) and not is_lazy(present)
    return saved.dtype is not None and not saved.form and is_plain


def _loads_by_itself(module: nn.Module) -> bool:
    own: object = type(module)._load_from_state_dict  # noqa: SLF001  # torch asks its users to override it
    return own is not nn.Module._load_from_state_dict  # noqa: SLF001  # as above


def _takes(module: nn.Module, kinds: Mapping[str, Kind], version: object) -> bool:
    """Whether a module would take tensors of these kinds, by their names in it."""
    state = {name: torch.zeros(kind.shape, dtype=kind.dtype, device="cpu") for name, kind in kinds.items()}
    versions = {} if version is None else {"": version}
    try:
        trial = copy.deepcopy(module, {id(child): nn.Identity() for child in module.children()})
        nn.Module.load_state_dict(trial, versioned_for(trial, state, versions), strict=False)
    except Exception:  # noqa: BLE001  # what fails here would fail in the load, so its shapes are refused
        return False
    return True

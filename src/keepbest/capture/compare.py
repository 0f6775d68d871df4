"""Compares what was saved with a model, before anything is loaded. **Rank-local**."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from keepbest.errors import SnapshotError
from keepbest.modules.sources import Source, StateDict

_LISTED_KEYS = 6


def by_source_key(source: Source, files: Mapping[str, StateDict]) -> StateDict:
    """What `files` hold for `source`, by its plain keys."""
    return {
        f"{source.path_of(part)}{key}": value
        for part in source.parts
        for key, value in files.get(part.name, {}).items()
    }


def compare(
    source: Source, present: StateDict, files: Mapping[str, StateDict], left_out: Mapping[str, Sequence[str]]
) -> StateDict:
    """What `files` hold for `source`, by its plain keys, after a check that all of it fits. **Rank-local**.

    Args:
        source: Source in the model.
        present: Its state dict, with plain keys.
        files: State dict of each part by name.
        left_out: Keys of each part that may be missing.

    Raises:
        SnapshotError: If keys, shapes or kinds of tensors differ.
    """
    saved = by_source_key(source, files)
    may_lack = {f"{source.path_of(part)}{key}" for part in source.parts for key in left_out.get(part.name, ())}
    wanted = {key for part in source.parts for key in present if source.key_in(part, key) is not None}
    reshaped = {key for key in saved.keys() & wanted if _shape(saved[key]) != _shape(present[key])}
    strange = {key for key in saved.keys() & wanted - reshaped if not _is_like(saved[key], present[key])}
    faults = [
        _listed("the snapshot lacks", wanted - saved.keys() - may_lack),
        _listed("the model lacks", saved.keys() - wanted),
        _listed("shapes differ for", reshaped),
        _listed("there are sparse, complex or empty (meta) tensors in the place of dense ones for", strange),
    ]
    if message := "; ".join(filter(None, faults)):
        where = f"submodel {source.path!r}" if source.path else "the model"
        raise SnapshotError(f"the snapshot is not of this model: in {where}, {message}. Nothing was loaded")
    return saved


def _listed(what: str, keys: set[str]) -> str:
    shown = ", ".join(sorted(keys)[:_LISTED_KEYS])
    more = f" and {len(keys) - _LISTED_KEYS} more" if len(keys) > _LISTED_KEYS else ""
    return f"{what} {shown}{more}" if keys else ""


def _is_like(value: object, target: object) -> bool:
    """Whether the values of the tensor `value` can be copied into `target`, which has the same shape."""
    if not isinstance(value, torch.Tensor) or not isinstance(target, torch.Tensor):
        return True
    is_dense = value.layout == torch.strided and not value.is_meta and not value.is_quantized
    return is_dense and value.dtype.is_complex == target.dtype.is_complex


def _shape(value: object) -> list[int] | None:
    return list(value.shape) if isinstance(value, torch.Tensor) else None

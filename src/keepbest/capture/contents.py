"""What a snapshot holds, as every rank must know it before anything is loaded. **Rank-local**."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from keepbest.errors import SnapshotError
from keepbest.formats.format import PartReader
from keepbest.modules.kinds import form_of
from keepbest.modules.parts import Part
from keepbest.modules.sources import Source

EXTRA_STATE = "_extra_state"
"""How torch names what `get_extra_state()` of a module returns."""


class Kind(NamedTuple):
    """What is known of a saved value before it is read.

    Attributes:
        shape: Shape of a tensor.
        dtype: Dtype of a tensor; `None` for what is no tensor.
        form: What else must be the same where it is loaded: empty for a dense tensor, whose elements can be copied one
            by one; else layout and class.
    """

    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    form: str = ""

    @classmethod
    def of(cls, value: object) -> Kind:
        """The kind of `value`."""
        if not isinstance(value, torch.Tensor):
            return cls()
        return cls(tuple(value.shape), value.dtype, form_of(value))

    def to_json(self) -> list[Any] | None:
        """JSON values only; `from_json` is the inverse."""
        if self.dtype is None:
            return None
        return [list(self.shape), str(self.dtype).removeprefix("torch."), self.form]

    @classmethod
    def from_json(cls, kind: Sequence[Any] | None) -> Kind:
        """The inverse of `to_json`."""
        return cls() if kind is None else cls(tuple(kind[0]), getattr(torch, kind[1]), kind[2])


@dataclass(frozen=True)
class PartContents:
    """What a snapshot holds of one part.

    Attributes:
        part: Part of the model.
        kinds: Kind of each value that is stored, by its key in the part.
        tied: Further names of stored tensors, and the key of each.
    """

    part: Part
    kinds: Mapping[str, Kind]
    tied: Mapping[str, str]

    @classmethod
    def of(cls, part: Part, reader: PartReader) -> PartContents:
        """What `reader` reads. Raises `SnapshotError` if it has keys that are no names."""
        kinds = {key: Kind(tuple(kind.shape), kind.dtype) for key, kind in reader.kinds.items()}
        kinds.update((key, Kind.of(value)) for key, value in reader.others.items())
        names: list[object] = list(kinds)  # of a file that anybody may have written
        if strange := [name for name in names if not isinstance(name, str)]:
            raise SnapshotError(f"the snapshot is not of this model: {strange[0]!r} is no name of a weight")
        return cls(part, kinds, reader.tied)

    @cached_property
    def names(self) -> dict[str, list[str]]:
        """All names of each stored value, by its key."""
        names = {key: [key] for key in self.kinds}
        for name, key in self.tied.items():
            names[key].append(name)
        return names

    @cached_property
    def names_to_keys(self) -> dict[str, str]:
        """The key under which each value is stored, by each of its names in the part."""
        return {**{key: key for key in self.kinds}, **self.tied}

    def to_json(self) -> list[Any]:
        """JSON values only; `from_json` is the inverse, for the same part."""
        return [[[key, kind.to_json()] for key, kind in self.kinds.items()], dict(self.tied)]

    @classmethod
    def from_json(cls, part: Part, content: Sequence[Any]) -> PartContents:
        """The inverse of `to_json`."""
        return cls(part, {key: Kind.from_json(kind) for key, kind in content[0]}, content[1])


def whole_key(place: Part | Source, key: str) -> str:
    """Name in the whole model of a `key` of a part or source."""
    return f"{place.path}.{key}" if place.path else key


def is_extra_state(key: str) -> bool:
    """Whether `key` is what a module keeps beside its weights, which comes and goes with its version."""
    return key.rpartition(".")[2] == EXTRA_STATE

"""Compares what was saved with the models of all ranks, before anything is loaded."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.nn.parameter import is_lazy

from keepbest.capture.contents import Kind, PartContents, is_extra_state, whole_key
from keepbest.capture.conversion import judge
from keepbest.errors import SnapshotError
from keepbest.formats.tied import identity_of
from keepbest.listing import listed
from keepbest.modules.kinds import (
    PLAIN_CLASSES,
    form_of,
    has_shards,
    has_shared_elements,
    is_dense,
    lacks_memory,
    local_of,
)
from keepbest.modules.parts import Part
from keepbest.modules.raw_bytes import raw_bytes

_PART = "only=... loads a part"


class Cast(NamedTuple):
    """Values whose dtype changes, so that it depends on them whether they can be loaded.

    Attributes:
        part: Name of the part.
        key: Key in the part under which they are stored.
        dtype: Dtype of the model, without `torch.`.
    """

    part: str
    key: str
    dtype: str


class StandIn(torch.Tensor):
    """A tensor that takes no memory, where only a shape and a dtype are asked for."""

    @classmethod
    def of(cls, shape: Sequence[int], dtype: torch.dtype) -> StandIn:
        """What stands for a tensor of this shape and dtype."""
        return torch.empty((), dtype=dtype, device="cpu").expand(tuple(shape)).as_subclass(cls)


@dataclass(slots=True)
class Comparison:
    """How a snapshot fits the model of one rank.

    Attributes:
        faults: For each part what is wrong, and with which keys of it.
        lacks: For each part the keys that this model does not have. Other ranks may have them.
        casts: Values that must be looked at.
        absent: Paths of the parts that this model does not have.
    """

    faults: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    lacks: dict[str, list[str]] = field(default_factory=dict)
    casts: list[Cast] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    _places: dict[Hashable, list[tuple[str, str]]] = field(default_factory=dict)  # for each tensor what it takes

    @property
    def tied(self) -> list[tuple[tuple[str, str], ...]]:
        """For each tensor of this model that is to take several stored ones, the part and key of each of them."""
        return [tuple(places) for places in self._places.values() if len(places) > 1]

    def to_json(self) -> list[Any]:
        """JSON values only; `from_json` is the inverse."""
        return [self.faults, self.lacks, self.casts, self.absent, self.tied]

    @classmethod
    def from_json(cls, content: Sequence[Any]) -> Comparison:
        """The inverse of `to_json`."""
        faults, lacks, casts, absent, tied = content
        places: dict[Hashable, list[tuple[str, str]]] = {
            number: [*map(tuple, each)] for number, each in enumerate(tied)
        }
        return cls(faults, lacks, [Cast(*cast) for cast in casts], absent, places)

    def add(
        self,
        contents: PartContents,
        saved: Mapping[str, Kind],
        present: Mapping[str, Any],
        may_lack: set[str],
        resized: set[str],
    ) -> None:
        """Compare one part. **Rank-local**.

        Args:
            contents: What the snapshot holds of it.
            saved: Those kinds in it that are to be loaded, by each of their names.
            present: What the model has in their place.
            may_lack: Keys of the model that need not be in the snapshot.
            resized: Keys of what its module brings to the shape that was saved.
        """
        name = contents.part.name
        lacks = sorted(key for key in saved.keys() - present.keys() if not is_extra_state(key))
        if lacks:
            self.lacks[name] = lacks
        faults: dict[str, list[str]] = {}
        missing = (key for key in present.keys() - saved.keys() - may_lack if not is_extra_state(key))
        faults["the snapshot lacks"] = sorted(missing)
        for key in sorted(saved.keys() & present.keys()):
            if is_extra_state(key):
                continue  # its shape and kind are the matter of the module
            self._note_place(contents, key, saved[key], present[key])
            target = _without_shards(present[key])
            if (fault := _misfit(saved[key], target, is_resized=key in resized)) is not None:
                faults.setdefault(fault, []).append(key)
            elif (saved_as := saved[key].dtype) is not None and judge(saved_as, target.dtype) == "depends":
                dtype = str(target.dtype).removeprefix("torch.")
                self.casts.append(Cast(name, contents.names_to_keys[key], dtype))
        if found := {fault: keys for fault, keys in faults.items() if keys}:
            self.faults[name] = found

    def _note_place(self, contents: PartContents, key: str, kind: Kind, target: object) -> None:
        if kind.dtype is None or kind.form or not isinstance(target, torch.Tensor):
            return
        place = identity_of(key, target) if type(target) in PLAIN_CLASSES and is_dense(target) else id(target)
        stored = contents.part.name, contents.names_to_keys[key]
        if stored not in (places := self._places.setdefault(place, [])):
            places.append(stored)


def refuse_misfits(parts: Iterable[Part], comparisons: Sequence[Comparison]) -> None:
    """Raise if a rank's model does not fit, or none has what was saved. The same on every rank. **Rank-local**.

    Args:
        parts: Parts that are to be loaded.
        comparisons: How the model of each rank fits.

    Raises:
        SnapshotError: Names the keys and what is wrong with them.
    """
    nowhere = set.intersection(*(set(found.absent) for found in comparisons))
    messages = [f"there is no submodel {path!r} in it" for path in sorted(nowhere)]
    for part in parts:
        faults: dict[str, set[str]] = {}
        for found in comparisons:
            for fault, keys in found.faults.get(part.name, {}).items():
                faults.setdefault(fault, set()).update(keys)
        if part.path not in nowhere:
            lacks = [set(found.lacks.get(part.name, ())) for found in comparisons]
            faults["the model lacks"] = set.intersection(*lacks)
        where = f"in submodel {part.path!r}, " if part.path else ""
        if wrong := "; ".join(f"{fault} {listed(sorted(keys))}" for fault, keys in faults.items() if keys):
            messages.append(f"{where}{wrong}")
    if messages:
        raise SnapshotError(f"the snapshot does not fit the model: {'; '.join(messages)}. Nothing was loaded; {_PART}")


def are_equal(one: object, other: object) -> bool:
    """Whether two values are dense tensors with the same bits. **Rank-local**."""
    if not (is_dense(one) and is_dense(other)):
        return False
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(raw_bytes(one), raw_bytes(other))


def refuse_losses(casts: Iterable[Cast], parts: Iterable[Part]) -> None:
    """Raise `SnapshotError` if there are values that would not stay what they are. **Rank-local**."""
    places = {part.name: part for part in parts}
    keys: dict[str, set[str]] = {}
    for cast in casts:
        keys.setdefault(cast.dtype, set()).add(whole_key(places[cast.part], cast.key))
    if keys:
        what = "; ".join(f"what the model has as {dtype} for {listed(sorted(keys[dtype]))}" for dtype in sorted(keys))
        raise SnapshotError(
            f"the snapshot has values that the dtype of the model cannot hold: {what}. Nothing was loaded"
        )


def _misfit(saved: Kind, target: Any, *, is_resized: bool) -> str | None:
    """What is wrong with loading a value of this kind into `target`."""
    if saved.dtype is None or not isinstance(target, torch.Tensor):
        is_data = saved.dtype is None and not isinstance(target, torch.Tensor)
        return None if is_data else "only one of the two has a tensor for"
    if (reason := _closed(target)) is not None:
        return reason
    if not (is_resized or is_lazy(target)) and saved.shape != tuple(target.shape):
        return "shapes differ for"
    if saved.form != (form := form_of(target)):
        return f"the snapshot has {saved.form or 'dense'} tensors, the model has {form or 'dense'} ones for"
    if judge(saved.dtype, target.dtype) == "never":
        dtypes = [str(dtype).removeprefix("torch.") for dtype in (saved.dtype, target.dtype)]
        return f"{dtypes[0]} cannot become {dtypes[1]} without a loss for"
    return None


def _closed(target: torch.Tensor) -> str | None:
    """Why nothing can be written into a tensor of the model, if so."""
    if target.is_meta:
        return "the meta device has no room (call to_empty(device=...) of the model before) for"
    if not is_lazy(target) and target.is_inference():
        return "what was made in torch.inference_mode() cannot change outside of it (make the model outside) for"
    if lacks_memory(local_of(target)):
        return "the storage of the model is freed, or too small (give the tensor memory again) for"
    if not (has_shards(target) or isinstance(target, StandIn) or is_lazy(target)) and has_shared_elements(target):
        return "the model has a tensor whose elements share memory (clone it) for"
    return None


def _without_shards(target: Any) -> Any:
    """What stands for the sharded tensors of FSDP1, which have no properties on a rank without a shard."""
    if not hasattr(target, "local_shards"):
        return target
    whole = target.metadata()
    return StandIn.of(whole.size, whole.tensor_properties.dtype)

"""What rank 0 needs room for, and which file each room belongs to, planned once for all saves of a layout. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from keepbest.capture.catalogue import Name
from keepbest.capture.share import Items
from keepbest.capture.union import Holding, Union
from keepbest.modules.sources import StateDict
from keepbest.staging.slot import Like


@dataclass(frozen=True, slots=True)
class WholePlan:
    """How the weights of a union lie on rank 0.

    Attributes:
        union: What the ranks agreed to hold.
        rooms: Key of each room, and what it is wanted for.
        copied: Each tensor that is copied, and the key of its room.
        files: For each part its keys, and the room of each.
        left_out: For each part the keys that are left out because they are frozen.
        is_simple: Whether rank 0 holds all of it whole, so that nothing travels among the ranks, and all of it is dense
            tensors of the model.
    """

    union: Union
    rooms: Mapping[str, Like]
    copied: Sequence[tuple[Name, str]]
    files: Mapping[str, tuple[Sequence[str], Sequence[str]]]
    left_out: Mapping[str, Sequence[str]]
    is_simple: bool

    @classmethod
    def of(cls, union: Union, items: Items) -> WholePlan:
        """The plan for `items`."""
        kept = dict(union.kept())
        rooms = {
            room_of(name): like(holding)
            for name, holding in kept.items()
            if not holding.entry.form.is_packed and not holding.entry.first
        }
        left_out = {part.name: keys for part in items.parts if (keys := union.left_out(part.name))}
        files: dict[str, dict[str, str]] = {}
        for name, holding in kept.items():
            first = Name(name.part, holding.entry.first or name.key)
            files.setdefault(name.part, {})[name.key] = room_of(first)
        # A flat FSDP1 parameter around submodels may, or may not, hold weights of the composite itself.
        for part in items.parts:
            if part.name not in files and not (part.name in left_out or part.apart):
                files[part.name] = {}
        return cls(
            union,
            rooms,
            [(name, room_of(name)) for name, holding in kept.items() if not holding.entry.first],
            {part: (list(files[part]), list(files[part].values())) for part in items.names if part in files},
            left_out,
            is_simple=not items.training_state and all(map(_is_simple, kept.values())),
        )

    def files_in(self, rooms: Mapping[str, torch.Tensor]) -> Mapping[str, StateDict]:
        """State dicts of the parts, of what is in the rooms when they are asked for."""
        return _Files(self.files, rooms)


class _Files(Mapping[str, StateDict]):
    """Puts a state dict together when it is asked for, since training need not wait for thousands of keys."""

    def __init__(
        self, places: Mapping[str, tuple[Sequence[str], Sequence[str]]], rooms: Mapping[str, torch.Tensor]
    ) -> None:
        self._places, self._rooms = places, rooms

    def __getitem__(self, part: str) -> StateDict:
        keys, rooms = self._places[part]
        return dict(zip(keys, map(self._rooms.__getitem__, rooms), strict=True))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def room_of(name: Name) -> str:
    """Key of the room of an entry."""
    return "/".join(name)


def like(holding: Holding) -> Like:
    """What its room is wanted for."""
    form = holding.entry.form
    is_live = holding.owner == 0 and not form.spread
    return Like(form.shape, getattr(torch, form.dtype), holding.entry.device, is_live)


def _is_simple(holding: Holding) -> bool:
    form = holding.entry.form
    return holding.owner == 0 and form.role in ("parameter", "buffer") and not form.spread and not form.is_packed

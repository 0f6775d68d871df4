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
        is_simple: Whether rank 0 holds all of it whole, so that nothing travels among the ranks, and all of it is dense
            tensors of the model.
    """

    union: Union
    rooms: Mapping[str, Like]
    copied: Sequence[tuple[Name, str]]
    files: Mapping[str, tuple[Sequence[str], Sequence[str]]]
    is_simple: bool

    @classmethod
    def of(cls, union: Union, items: Items) -> WholePlan:
        """The plan for `items`."""
        rooms = {
            room_of(name): like(holding)
            for name, holding in union.kept.items()
            if not holding.entry.form.is_packed and not holding.entry.first
        }
        files: dict[str, dict[str, str]] = {part: {} for part in union.files_of(items)}
        for name, holding in union.kept.items():
            files[name.part][name.key] = room_of(Name(name.part, holding.entry.first or name.key))
        return cls(
            union,
            rooms,
            [(name, room_of(name)) for name, holding in union.kept.items() if not holding.entry.first],
            {part: (list(each), list(each.values())) for part, each in files.items()},
            is_simple=not items.training_state and all(map(_is_simple, union.kept.values())),
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

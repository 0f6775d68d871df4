"""Where saved values come from: rank 0, which reads them and hands them on, or the files that every rank sees."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from keepbest.capture.compare import Cast, StandIn, are_equal
from keepbest.capture.contents import Kind, PartContents
from keepbest.capture.conversion import survives
from keepbest.capture.fsdp1 import fsdp1_state_dict, full_fsdp1_state, sharded_fsdp1_state, sharded_state_dict
from keepbest.capture.selection import Selection, chosen_parts
from keepbest.capture.states import Stateful
from keepbest.capture.target_room import localized, room_for
from keepbest.formats.format import Format, PartReader
from keepbest.modules.parts import Part
from keepbest.modules.sources import Source, StateDict
from keepbest.ranks import NO_REMEDY, Ranks
from keepbest.run.manifest import Manifest
from keepbest.run.reader import FoundSnapshot

T = TypeVar("T")
Places = Sequence[tuple[str, str]]
"""Names of parts and keys in them, of stored values that are for one place in the model."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A snapshot that is to be loaded.

    Attributes:
        manifest: Manifest of it, on every rank.
        format: Format of its files.
        found: Where this rank reads it; `None` on ranks that do not read.
        is_shared: Whether the ranks that read see one folder, or each has a copy of its own.
        selection: Names in the model that are loaded; the same on every rank.
        training_state: Objects that take training states of the snapshot, by name; the same names on every rank.
    """

    manifest: Manifest
    format: Format
    found: FoundSnapshot | None
    is_shared: bool
    selection: Selection
    training_state: Mapping[str, Stateful] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that are read: those with files in which anything may be wanted, then the training states."""
        return (*chosen_parts(self.manifest, self.selection), *(Part(name, "") for name in self.training_state))

    def readers(self, found: FoundSnapshot) -> dict[str, PartReader]:
        """A reader of each part."""
        files = found.manifest.files
        return {part.name: self.format.reader(found.folder, files, part.name) for part in self.parts}


@dataclass(slots=True)
class Feed(ABC):
    """Gives each rank the values of a snapshot that its model wants.

    Attributes:
        stored: Snapshot, found by the ranks that read.
        ranks: Ranks of the model.
        step: What is being done, in words.
    """

    stored: Stored
    ranks: Ranks
    step: str
    _readers: Mapping[str, PartReader] = field(default_factory=dict)

    @abstractmethod
    def contents(self) -> list[PartContents]:
        """Verify the files, and return what the snapshot holds of each part. **Collective**.

        Raises:
            SnapshotError: On every rank, if a file is missing or damaged.
        """

    @abstractmethod
    def layout(self, source: Source) -> StateDict:
        """What stands for the state dict of a source with FSDP1 units, with plain keys. **Collective**."""

    @abstractmethod
    def bring(self, contents: PartContents, keys: Sequence[str], targets: Mapping[str, Any]) -> StateDict:
        """Values of one part, in tensors of their own. **Collective**.

        Args:
            contents: What the snapshot holds of the part.
            keys: Keys under which the values are stored; the same on every rank.
            targets: What the model of this rank has in their place, by each of their names.

        Raises:
            KeepBestError: On every rank, or as `Ranks.lose`.
        """

    @abstractmethod
    def loading(self, module: nn.Module) -> AbstractContextManager[None]:
        """FSDP1 units of `module` take what `bring` gives in this block."""

    def losses(self, casts: Sequence[Cast]) -> list[Cast]:
        """Those of `casts`, which are the same on every rank, whose values would change. **Collective**."""
        return [casts[number] for number in self._which(casts, self._is_lost)]

    def differing(self, groups: Sequence[Places]) -> list[int]:
        """Which of `groups`, the same on every rank, have values that differ within the group. **Collective**.

        No value travels, and one rank has two of them at a time.
        """
        return self._which(groups, self._differs)

    @abstractmethod
    def _which(self, things: Sequence[T], is_one: Callable[[T], bool]) -> list[int]:
        """The numbers of those of `things`, the same on every rank, of which `is_one` holds. **Collective**."""

    def _is_lost(self, cast: Cast) -> bool:
        return not survives(self._readers[cast.part].fetch(cast.key), getattr(torch, cast.dtype))

    def _differs(self, places: Places) -> bool:
        values = (_read_whole(self._readers[part], key) for part, key in places)
        first = next(values)
        return not all(are_equal(first, value) for value in values)

    def _open(self, *share: int) -> list[PartContents]:
        """Verify the files, or a share of them, and open the parts. **Rank-local**, on a rank that reads."""
        found = self.stored.found
        if found is None:
            raise RuntimeError(f"rank {self.ranks.rank} was not given the folder of the snapshot")
        found.check_before_use(*share, parts={part.name for part in self.stored.parts})
        self._readers = self.stored.readers(found)
        return [PartContents.of(part, self._readers[part.name]) for part in self.stored.parts]


@dataclass(slots=True)
class FromMain(Feed):
    """Rank 0 reads, and sends each value once."""

    def contents(self) -> list[PartContents]:
        contents = self.ranks.broadcast(
            self.step, lambda: [each.to_json() for each in self._open()], remedy=NO_REMEDY, saving=True
        )
        return [PartContents.from_json(part, each) for part, each in zip(self.stored.parts, contents, strict=True)]

    def layout(self, source: Source) -> StateDict:
        return fsdp1_state_dict(source, _stand_in, rank0_only=False)

    def bring(self, contents: PartContents, keys: Sequence[str], targets: Mapping[str, Any]) -> StateDict:
        reader = self._readers.get(contents.part.name)
        brought: StateDict = {}
        try:
            for key in keys:
                value = self._sent(key, contents.kinds[key], reader)
                for name in contents.names[key]:
                    if name in targets:
                        brought[name] = localized(value, targets[name])
        except BaseException as error:  # noqa: BLE001  # lose raises
            self.ranks.lose(self.step, error)
        return brought

    def loading(self, module: nn.Module) -> AbstractContextManager[None]:
        return full_fsdp1_state(module, rank0_only=False)

    def _which(self, things: Sequence[T], is_one: Callable[[T], bool]) -> list[int]:
        all_of_them = range(len(things))
        found: list[int] = self.ranks.broadcast(
            self.step,
            lambda: [number for number in all_of_them if is_one(things[number])],
            remedy=NO_REMEDY,
            saving=True,
        )
        return found

    def _sent(self, key: str, kind: Kind, reader: PartReader | None) -> Any:
        if kind.dtype is None or kind.form:
            return self._packed(None if reader is None else reader.others[key])
        if reader is not None:
            tensor = reader.fetch(key).resolve_conj().resolve_neg().contiguous()
        else:
            tensor = torch.empty(kind.shape, dtype=kind.dtype, device="cpu")
        if self.ranks.control_group is not None and tensor.numel():
            # Bytes, since gloo does not know every dtype.
            dist.broadcast(tensor.view(-1).view(torch.uint8), group=self.ranks.control_group, group_src=0)
        return tensor

    def _packed(self, value: Any) -> Any:
        """What is no dense tensor, as bytes."""
        if self.ranks.control_group is None:
            return value
        torch.save(value, packed := io.BytesIO())
        data = torch.frombuffer(packed.getbuffer(), dtype=torch.uint8)
        dist.broadcast(size := torch.tensor([data.numel()], device="cpu"), group=self.ranks.control_group, group_src=0)
        data = data if self.ranks.is_main else torch.empty(int(size), dtype=torch.uint8, device="cpu")
        dist.broadcast(data, group=self.ranks.control_group, group_src=0)
        return torch.load(io.BytesIO(data.numpy().tobytes()), map_location="cpu", weights_only=True)


@dataclass(slots=True)
class FromFiles(Feed):
    """Every rank reads the shards that its model holds.

    Every rank verifies its share of the files first, or all of them, if others do not see the same ones.
    """

    def contents(self) -> list[PartContents]:
        share = (self.ranks.rank, self.ranks.world_size) if self.stored.is_shared else ()
        return self.ranks.agree(self.step, lambda: self._open(*share), remedy=NO_REMEDY, saving=True)

    def layout(self, source: Source) -> StateDict:
        return sharded_state_dict(source)

    def bring(self, contents: PartContents, keys: Sequence[str], targets: Mapping[str, Any]) -> StateDict:
        return self.ranks.agree(self.step, lambda: self._read(contents, keys, targets), remedy=NO_REMEDY, saving=True)

    def loading(self, module: nn.Module) -> AbstractContextManager[None]:
        return sharded_fsdp1_state(module)

    def _which(self, things: Sequence[T], is_one: Callable[[T], bool]) -> list[int]:
        mine = range(self.ranks.rank, len(things), self.ranks.world_size)
        found = self.ranks.gather_json(
            self.step, lambda: [number for number in mine if is_one(things[number])], remedy=NO_REMEDY, saving=True
        )
        return sorted(chain.from_iterable(found))

    def _read(self, contents: PartContents, keys: Sequence[str], targets: Mapping[str, Any]) -> StateDict:
        reader = self._readers[contents.part.name]
        brought: StateDict = {}
        rooms: dict[tuple[str, int], torch.Tensor] = {}  # with the id of what each is for: tied weights want one
        wanted: dict[str, torch.Tensor] = {}
        for key in keys:
            kind = contents.kinds[key]
            for name in (name for name in contents.names[key] if name in targets):
                if kind.dtype is None or kind.form:
                    brought[name] = reader.others[key]
                    continue
                place = key, id(targets[name])
                if place not in rooms:
                    rooms[place] = wanted[name] = room_for(kind, targets[name])
                brought[name] = rooms[place]
        reader.fill(wanted)
        return brought


def _read_whole(reader: PartReader, key: str) -> object:
    others = reader.others
    return others[key] if key in others else reader.fetch(key)


def _stand_in(_: str, value: torch.Tensor) -> torch.Tensor:
    return StandIn.of(value.shape, value.dtype)

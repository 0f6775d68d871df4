"""From the files of a snapshot into a model: the way back of a capture. **Collective**."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from keepbest.capture.compare import compare
from keepbest.capture.fsdp1 import sharded_fsdp1_state, sharded_state_dict
from keepbest.capture.place import place_weights
from keepbest.formats.format import Format, PartReader
from keepbest.modules.parts import Part
from keepbest.modules.sources import Source, StateDict, list_sources
from keepbest.ranks import Ranks
from keepbest.run.manifest import Manifest
from keepbest.run.reader import FoundSnapshot


@dataclass(frozen=True, slots=True)
class Stored:
    """A snapshot that is to be loaded.

    Attributes:
        manifest: Manifest of it, on every rank.
        format: Format of its files.
        found: Where this rank reads it; `None` on ranks that do not read.
        is_shared: Whether the ranks that read see one folder, or each has a copy of its own.
    """

    manifest: Manifest
    format: Format
    found: FoundSnapshot | None
    is_shared: bool

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that have files."""
        return tuple(Part(*part) for part in self.manifest.saved_parts)

    def readers(self, found: FoundSnapshot) -> dict[str, PartReader]:
        """A reader of each part."""
        files = found.manifest.files
        return {part.name: self.format.reader(found.folder, files, part.name) for part in self.parts}


class Restore(Protocol):
    """Loads a snapshot into a model. **Collective**."""

    def __call__(self, model: nn.Module, stored: Stored, ranks: Ranks, step: str) -> None: ...


def restore_gathered(model: nn.Module, stored: Stored, ranks: Ranks, step: str) -> None:
    """Read a snapshot on rank 0, after every file was verified, and hand it to the others. **Collective**.

    Args:
        model: Model, plain or wrapped. Another strategy and another number of ranks than saved it are fine.
        stored: Snapshot, found by rank 0.
        ranks: Ranks of the model.
        step: What is being done, in words.

    Raises:
        SnapshotError: On every rank, if a file is missing or damaged. Otherwise as `place_weights`.
    """

    def read() -> dict[str, StateDict]:
        if stored.found is None:
            return {}
        stored.found.check_files()
        return {name: _whole(reader) for name, reader in stored.readers(stored.found).items()}

    files = ranks.agree(step, read, saving=True)
    place_weights(model, stored.parts, files, stored.manifest.left_out, ranks=ranks)


def restore_local(model: nn.Module, stored: Stored, ranks: Ranks, step: str) -> None:
    """Read on each rank the shards that it holds. **Collective**.

    Every rank verifies its share of the files first, or all of them, if others do not see the same ones.

    Args:
        model: Model, plain or wrapped. Another strategy and another number of ranks than saved it are fine.
        stored: Snapshot, found by every rank.
        ranks: Ranks of the model.
        step: What is being done, in words.

    Raises:
        SnapshotError: On every rank, if a file is missing or damaged, or keys or shapes differ from the model's. The
            model is then as it was.
        RankFailedError: On every rank, if reading fails later. Parts may be loaded then.
    """
    sources, readers = ranks.agree(step, lambda: _verify_and_open(model, stored, ranks), saving=True)
    state = _present(sources, ranks, step)

    def compare_all() -> None:
        # Of tensors only shapes and dtypes are compared: stand-ins that take no memory.
        saved = {name: {**_stand_ins(reader), **reader.others} for name, reader in readers.items()}
        for source in sources:
            compare(source, state[source.path], saved, stored.manifest.left_out)

    ranks.agree(step, compare_all)
    for source in sources:
        # Not what was compared: FSDP1 gives copies, in which what was loaded since would be missing.
        present = _present([source], ranks, step)[source.path]

        def fill(source: Source = source, present: StateDict = present) -> None:
            for part in source.parts:
                reader, inside = readers[part.name], source.path_of(part)
                reader.fill({key: present[inside + key] for key in (*reader.kinds, *reader.tied)})

        ranks.agree(step, fill, saving=True)
        _load_rest(source, present, readers, ranks, step)


def _whole(reader: PartReader) -> StateDict:
    tensors = {key: reader.fetch(key) for key in reader.kinds}
    tied = {key: tensors[first] for key, first in reader.tied.items()}
    return {**tensors, **tied, **reader.others}


def _verify_and_open(model: nn.Module, stored: Stored, ranks: Ranks) -> tuple[list[Source], dict[str, PartReader]]:
    found = stored.found
    if found is None:
        raise RuntimeError(f"rank {ranks.rank} was not given the folder of the snapshot")
    found.check_files(*((ranks.rank, ranks.world_size) if stored.is_shared else ()))
    return list_sources(model, stored.parts, save_frozen_weights=True), stored.readers(found)


def _present(sources: Sequence[Source], ranks: Ranks, step: str) -> dict[str, StateDict]:
    try:
        return {source.path: sharded_state_dict(source) for source in sources}
    except BaseException as error:  # noqa: BLE001  # lose raises
        ranks.lose(step, error)


def _stand_ins(reader: PartReader) -> dict[str, Any]:
    kinds = {**reader.kinds, **{key: reader.kinds[first] for key, first in reader.tied.items()}}
    return {key: torch.empty((), dtype=kind.dtype).expand(tuple(kind.shape)) for key, kind in kinds.items()}


def _load_rest(source: Source, present: StateDict, readers: Mapping[str, PartReader], ranks: Ranks, step: str) -> None:
    """Load what is no tensor, and FSDP1's shards. The other tensors of the model have been read into."""
    others = {
        source.path_of(part) + key: value for part in source.parts for key, value in readers[part.name].others.items()
    }
    if source.holds_fsdp1:
        whole = {source.names.key(key): value for key, value in {**present, **others}.items()}
        try:
            with sharded_fsdp1_state(source.module):
                source.module.load_state_dict(whole, strict=False)
        except BaseException as error:  # noqa: BLE001  # lose raises
            ranks.lose(step, error)
    elif others:
        named = {source.names.key(key): value for key, value in others.items()}
        ranks.agree(step, lambda: source.module.load_state_dict(named, strict=False))

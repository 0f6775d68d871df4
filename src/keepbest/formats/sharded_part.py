"""Reads a folder of torch's distributed checkpoints. **Rank-local**."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from keepbest.errors import SnapshotError
from keepbest.formats.format import StateDict, TensorKind
from keepbest.modules.quiet import quiet


class ShardedPart:
    """A part of a snapshot whose shards lie in a folder: a `PartReader`.

    Args:
        path: Folder of the shards.
        files: Files of the part that were verified, by their paths in the folder of the snapshot.
        others: What is no tensor, by its key.
        tied: Further names of stored tensors, and the key of each.

    Raises:
        SnapshotError: If the index cannot be read, or names what is not there.
    """

    def __init__(self, path: Path, *, files: Collection[str], others: StateDict, tied: Mapping[str, str]) -> None:
        self._path = path
        self.others = others
        self.tied = tied
        try:
            self._index: Metadata = FileSystemReader(path).read_metadata()
        except Exception as error:
            raise SnapshotError(f"{path} cannot be read as a distributed checkpoint: {error!r}") from error
        shards = {info.relative_path for info in self._index.storage_data.values()}
        if strange := sorted(shard for shard in shards if f"{path.name}/{shard}" not in files):
            raise SnapshotError(f"{path} names files that are not recorded in the snapshot: {', '.join(strange)}")
        stored = self._index.state_dict_metadata.keys()
        if strange := sorted((set(tied.values()) - stored) | (tied.keys() & stored)):
            raise SnapshotError(f"{path} and the file of its tied tensors do not agree about {strange[0]!r}")

    @cached_property
    def kinds(self) -> dict[str, TensorKind]:
        """Shape and dtype of each tensor that is stored, by its key."""
        kinds = {}
        for key, entry in self._index.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise SnapshotError(f"{self._path} holds {key!r}, which is no tensor")
            kinds[key] = TensorKind(entry.size, entry.properties.dtype)
        return kinds

    def fetch(self, key: str) -> torch.Tensor:
        # Each shard is read from where the index says that it lies: to plan a read of one key takes a look at all.
        shape, dtype = self.kinds[key]
        chunks = cast("TensorStorageMetadata", self._index.state_dict_metadata[key]).chunks
        if len(chunks) == 1 and chunks[0].sizes == shape:
            return self._read(key, chunks[0], dtype)
        whole, filled = torch.empty(tuple(shape), dtype=dtype), 0
        for chunk in chunks:
            region = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
            if whole[region].shape == chunk.sizes:
                whole[region] = self._read(key, chunk, dtype)
                filled += chunk.sizes.numel()
        if filled != whole.numel():
            raise SnapshotError(f"{self._path} is damaged: the shards of {key!r} do not make the whole of it")
        return whole

    def fill(self, wanted: Mapping[str, torch.Tensor]) -> None:
        # Names of one tensor may stand for different ones in the model; each round reads what has one key.
        rounds: list[dict[str, torch.Tensor]] = [{}]
        for name, tensor in wanted.items():
            key = self.tied.get(name, name)
            if all(held.get(key) is not tensor for held in rounds):
                free = next((held for held in rounds if key not in held), None)
                if free is None:
                    rounds.append(free := {})
                free[key] = tensor
        for held in rounds:
            self._fill(held)

    def _fill(self, wanted: dict[str, Any]) -> None:
        reader, planner = FileSystemReader(self._path), DefaultLoadPlanner()
        with quiet():
            planner.set_up_planner(wanted, self._index, is_coordinator=True)
            reader.set_up_storage_reader(self._index, is_coordinator=True)
            plan = reader.prepare_local_plan(planner.create_local_plan())
            [plan] = reader.prepare_global_plan(planner.create_global_plan([plan]))
            reader.read_data(planner.finish_plan(plan), planner).wait()

    def _read(self, key: str, chunk: ChunkStorageMetadata, dtype: torch.dtype) -> torch.Tensor:
        try:
            info = self._index.storage_data[MetadataIndex(key, chunk.offsets)]
            with (self._path / info.relative_path).open("rb") as file:
                file.seek(info.offset)
                piece = torch.load(io.BytesIO(file.read(info.length)), map_location="cpu", weights_only=True)
        except Exception as error:
            raise SnapshotError(f"{self._path}: a shard of {key!r} cannot be read: {error!r}") from error
        if not isinstance(piece, torch.Tensor) or (piece.shape, piece.dtype) != (chunk.sizes, dtype):
            raise SnapshotError(f"{self._path} is damaged: a shard of {key!r} is not what the index says")
        return piece

"""Reads a folder of torch's distributed checkpoints. **Rank-local**."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from keepbest.errors import SnapshotError
from keepbest.formats.format import StateDict, TensorKind
from keepbest.formats.index import read_index
from keepbest.formats.shards import Shard, ShardReader
from keepbest.modules.kinds import is_dense
from keepbest.modules.quiet import quiet
from keepbest.run.no_links import open_file


class ShardedPart:
    """A part of a snapshot whose shards lie in a folder: a `PartReader`.

    Args:
        path: Folder of the shards.
        files: Files of the part that were verified, by their paths in the folder of the snapshot.
        others: What does not lie in the shards, by its key: what is no weight.
        tied: Further names of stored tensors, and the key of each.

    Raises:
        SnapshotError: If the index cannot be read, or names what is not there.
    """

    def __init__(self, path: Path, *, files: Collection[str], others: StateDict, tied: Mapping[str, str]) -> None:
        self._path = path
        # An extra state may be a tensor, whose shape is another one in each snapshot.
        self._apart = {key: value for key, value in others.items() if is_dense(value)}
        self.others = {key: value for key, value in others.items() if key not in self._apart}
        self.tied = tied
        self._reader = ShardReader()
        self._index: Metadata = read_index(path)
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
        return kinds | {key: TensorKind(value.shape, value.dtype) for key, value in self._apart.items()}

    def fetch(self, key: str) -> torch.Tensor:
        if key in self._apart:
            return self._apart[key]
        # Each shard is read from where the index says that it lies: to plan a read of one key takes a look at all.
        shape, dtype = self.kinds[key]
        chunks = self._chunks(key)
        if len(chunks) == 1 and chunks[0].sizes == shape:
            return self._read_at(key, chunks[0].offsets)
        # Before there is memory for it: the shards lie in the files, and the whole does not.
        if sum(chunk.sizes.numel() for chunk in chunks) != torch.Size(shape).numel():
            raise SnapshotError(f"{self._path} is damaged: the shards of {key!r} do not make the whole of it")
        whole, filled = torch.empty(tuple(shape), dtype=dtype, device="cpu"), 0
        for chunk in chunks:
            region = _region(chunk.offsets, chunk.sizes)
            if whole[region].shape == chunk.sizes:
                whole[region] = self._read_at(key, chunk.offsets)
                filled += chunk.sizes.numel()
        if filled != whole.numel():
            raise SnapshotError(f"{self._path} is damaged: the shards of {key!r} do not make the whole of it")
        return whole

    def fill(self, wanted: Mapping[str, torch.Tensor]) -> None:
        # Names of one tensor may stand for different ones in the model; each round reads what has one key.
        rounds: list[dict[str, torch.Tensor]] = [{}]
        for name, tensor in wanted.items():
            key = self.tied.get(name, name)
            if key in self._apart:
                tensor.copy_(self._apart[key])
            elif all(held.get(key) is not tensor for held in rounds):
                free = next((held for held in rounds if key not in held), None)
                if free is None:
                    rounds.append(free := {})
                free[key] = tensor
        for held in rounds:
            self._fill(held)

    def _fill(self, wanted: dict[str, Any]) -> None:
        planner = DefaultLoadPlanner()
        with quiet(), torch.device("cpu"):  # torch plans with tensors of the default device, which may be any
            planner.set_up_planner(wanted, self._index, is_coordinator=True)
            [plan] = planner.create_global_plan([planner.create_local_plan()])
            items = planner.finish_plan(plan).items
        by_file: dict[str, list[tuple[Shard, ReadItem]]] = {}
        for item in items:
            shard = self._find(item.storage_index)
            by_file.setdefault(shard.file, []).append((shard, item))
        for name, there in by_file.items():
            with self._open(name) as file:
                for shard, item in there:
                    piece = self._read(file, shard)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(piece[_region(item.storage_offsets, item.lengths)])
                    planner.commit_tensor(item, target)

    @cached_property
    def _shards(self) -> dict[MetadataIndex, Shard]:
        """Each shard of a tensor, by its key and its place in the tensor."""
        shards = {}
        for key, kind in self.kinds.items():
            if key in self._apart:
                continue
            for chunk in self._chunks(key):
                index = MetadataIndex(key, chunk.offsets)
                if info := self._index.storage_data.get(index):
                    place = info.relative_path, info.offset, info.length
                    shards[index] = Shard(key, *place, chunk.sizes, kind.dtype)
        return shards

    def _chunks(self, key: str) -> list[ChunkStorageMetadata]:
        return cast("TensorStorageMetadata", self._index.state_dict_metadata[key]).chunks

    def _find(self, index: MetadataIndex) -> Shard:
        if index not in self._shards:
            raise SnapshotError(f"{self._path} is damaged: a shard of {index.fqn!r} is nowhere")
        return self._shards[index]

    def _read_at(self, key: str, offsets: Sequence[int]) -> torch.Tensor:
        shard = self._find(MetadataIndex(key, offsets))
        with self._open(shard.file) as file:
            return self._read(file, shard)

    def _open(self, name: str) -> BinaryIO:
        try:
            return open_file(self._path / name)
        except OSError as error:
            raise SnapshotError(f"{self._path / name} cannot be read: {error}") from error

    def _read(self, file: BinaryIO, shard: Shard) -> torch.Tensor:
        try:
            piece = self._reader.read(file, shard)
        except Exception as error:
            raise SnapshotError(f"{self._path}: a shard of {shard.key!r} cannot be read: {error!r}") from error
        if not isinstance(piece, torch.Tensor) or (piece.shape, piece.dtype) != (shard.shape, shard.dtype):
            raise SnapshotError(f"{self._path} is damaged: a shard of {shard.key!r} is not what the index says")
        return piece


def _region(offsets: Sequence[int], lengths: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) for start, length in zip(offsets, lengths, strict=True))

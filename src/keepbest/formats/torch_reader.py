"""What torch's own `load` needs to read a distributed checkpoint without running the code in it. **Rank-local**.

torch unpickles the index, and each value that is no tensor, without a check.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from keepbest.errors import SnapshotError
from keepbest.formats.index import Place, read_index
from keepbest.formats.plain_load import load_plain_bytes
from keepbest.run.inside import open_file


class PlainReader(FileSystemReader):
    """Reads a folder of torch's distributed checkpoints. No code in it is run.

    Args:
        path: Folder of the shards.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._folder = path

    def read_metadata(self) -> Metadata:  # of one rank alone there is no index here
        """The index. Raises `SnapshotError`."""
        return read_index(self._folder)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what is planned. Raises `SnapshotError`."""
        for item in plan.items:
            place: Place = self.storage_data[item.storage_index]
            with open_file(self._folder / place.relative_path) as file:
                file.seek(place.offset)
                self._give(file.read(place.length), item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _give(self, data: bytes, item: ReadItem, planner: LoadPlanner) -> None:
        if item.type == LoadItemType.BYTE_IO:
            planner.load_bytes(item, io.BytesIO(data))
            return
        value = self._plain(data, item)
        piece = value[
            tuple(
                slice(start, start + length) for start, length in zip(item.storage_offsets, item.lengths, strict=True)
            )
        ]
        target = planner.resolve_tensor(item).detach()
        if piece.shape != target.shape:
            raise SnapshotError(f"{self._folder}: a shard of {item.storage_index.fqn!r} is not what the index says")
        target.copy_(piece)
        planner.commit_tensor(item, target)

    def _plain(self, data: bytes, item: ReadItem) -> torch.Tensor:
        value = _loaded(data, item)
        if not isinstance(value, torch.Tensor):
            raise SnapshotError(f"{self._folder}: {item.storage_index.fqn!r} is no tensor")
        return value


class PlainPlanner(DefaultLoadPlanner):
    """Plans a load as torch does, and takes plain data only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Take a value that is no tensor. Raises `SnapshotError` if it is no plain data."""
        # The class above unpickles without a check: it gets what was just made from plain data.
        torch.save(_loaded(value.getvalue(), read_item), plain := io.BytesIO())
        plain.seek(0)
        super().load_bytes(read_item, plain)


def _loaded(data: bytes, item: ReadItem) -> Any:
    try:
        return load_plain_bytes(data)
    except Exception as error:
        raise SnapshotError(f"{item.storage_index.fqn!r} cannot be read: {type(error).__name__}: {error}") from error

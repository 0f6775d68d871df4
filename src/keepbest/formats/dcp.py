"""torch's distributed checkpoints: every rank writes its share, for models that no host can hold.

    snapshots/E7_U140_S8960/   encoder.dcp/__0_0.distcp  encoder.dcp/__1_0.distcp  encoder.dcp/.metadata  snapshot.json

What is no tensor lies in a file beside the folder, since torch would unpickle it without a check.

The capture plans who writes what. Here each rank writes its part of the plan, and rank 0 writes the index, so nothing
here is a collective.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from keepbest.errors import SnapshotError
from keepbest.formats import torch_file
from keepbest.formats.format import Format, Receipt, StateDict, TensorKind, ToWrite, special_kind
from keepbest.modules.quiet import quiet
from keepbest.run.digest import digest_file
from keepbest.run.files import Files
from keepbest.run.manifest import FileRecord
from keepbest.run.names import part_name

_ENDING = ".dcp"
_INDEX = ".metadata"


@dataclass(frozen=True, slots=True)
class SharePlan:
    """What one rank writes of a part, by torch's planner.

    Attributes:
        planner: Planner that has the tensors of this rank.
        plan: Items that this rank writes.
        metadata: On rank 0, what is known of the whole; `None` elsewhere.
    """

    planner: SavePlanner
    plan: SavePlan
    metadata: Metadata | None


class DistributedCheckpoint(Format):
    """A folder for each part, which `torch.distributed.checkpoint.load` reads."""

    name = "dcp"
    capture = "local"

    def check(self) -> None:
        """It needs torch alone."""

    def cannot_hold(self, value: object) -> str | None:
        if isinstance(value, torch.Tensor) and (kind := special_kind(value)):
            return f"is {kind}, which format 'dcp' cannot hold; use format 'torch'"
        return None

    def write(self, files: Files, folder: Path, share: ToWrite) -> Receipt:
        records: dict[str, FileRecord] = {}
        written: dict[str, list[WriteResult]] = {}
        for part, state in share.files.items():
            inside = folder / _folder_name(part)
            files.make_folder(inside)
            planned: SharePlan = share.plans[part]
            # torch syncs a file before it has flushed it, so it is synced below, by path.
            writer = FileSystemWriter(inside, sync_files=False)
            with quiet(), torch_file.without_crc32():
                # torch would leave an empty file where there is nothing to write.
                is_empty = not planned.plan.items
                written[part] = [] if is_empty else writer.write_data(planned.plan, planned.planner).wait()
            for name in sorted({result.storage_data.relative_path for result in written[part]}):
                records[f"{inside.name}/{name}"] = _durable(files, inside / name, part)
            if others := {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}:
                path = folder / _file_of_others(part)
                records[path.name] = FileRecord(part, torch_file.FORMAT.write_file(files, path, others), 0)
            files.sync_folder(inside)
        return Receipt(records, base64.b64encode(pickle.dumps(written)).decode())

    def complete(
        self, files: Files, folder: Path, share: ToWrite, receipts: Sequence[Receipt]
    ) -> dict[str, FileRecord]:
        records = super().complete(files, folder, share, receipts)
        for name, record in records.items():
            if (size := (folder / name).stat().st_size) != record.digest.bytes:
                raise OSError(f"{folder / name} has {size} bytes here; another rank wrote {record.digest.bytes}")
        results = [pickle.loads(base64.b64decode(receipt.note)) for receipt in receipts]
        for part, planned in share.plans.items():
            inside = folder / _folder_name(part)
            FileSystemWriter(inside, sync_files=False).finish(planned.metadata, [each[part] for each in results])
            records[f"{inside.name}/{_INDEX}"] = _durable(files, inside / _INDEX, part)
            files.sync_folder(inside)
        return records

    def reader(self, folder: Path, files: Mapping[str, FileRecord], part: str) -> ShardedPart:
        return ShardedPart(folder, files, part)


FORMAT = DistributedCheckpoint()


class ShardedPart:
    """A part of a snapshot whose shards lie in a folder: a `PartReader`.

    Attributes:
        kinds: Shape and dtype of each tensor that is stored, by its key.
        tied: Empty, since a distributed checkpoint does not know which tensors were one.
        others: What is no tensor, by its key.
    """

    def __init__(self, folder: Path, files: Mapping[str, FileRecord], part: str) -> None:
        self._path = folder / _folder_name(part)
        self.tied: dict[str, str] = {}
        name = _file_of_others(part)
        self.others: StateDict = torch_file.FORMAT.read_file(folder / name) if name in files else {}
        try:
            self._metadata = FileSystemReader(self._path).read_metadata()
        except Exception as error:
            raise SnapshotError(f"{self._path} cannot be read as a distributed checkpoint: {error!r}") from error

    @cached_property
    def kinds(self) -> dict[str, TensorKind]:
        kinds = {}
        for key, entry in self._metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise SnapshotError(f"{self._path} holds {key!r}, which is no tensor")
            kinds[key] = TensorKind(entry.size, entry.properties.dtype)
        return kinds

    def fetch(self, key: str) -> torch.Tensor:
        shape, dtype = self.kinds[key]
        whole = torch.empty(tuple(shape), dtype=dtype)
        self.fill({key: whole})
        return whole

    def fill(self, wanted: Mapping[str, torch.Tensor]) -> None:
        reader, planner = FileSystemReader(self._path), DefaultLoadPlanner()
        state: dict[str, Any] = dict(wanted)
        with quiet():
            planner.set_up_planner(state, self._metadata, is_coordinator=True)
            reader.set_up_storage_reader(self._metadata, is_coordinator=True)
            plan = reader.prepare_local_plan(planner.create_local_plan())
            [plan] = reader.prepare_global_plan(planner.create_global_plan([plan]))
            reader.read_data(planner.finish_plan(plan), planner).wait()


def _durable(files: Files, path: Path, part: str) -> FileRecord:
    files.sync_file(path)
    return FileRecord(part, digest_file(path))


def _folder_name(part: str) -> str:
    return f"{part_name(part)}{_ENDING}"


def _file_of_others(part: str) -> str:
    return f"{part_name(part)}{torch_file.FORMAT.ending}"

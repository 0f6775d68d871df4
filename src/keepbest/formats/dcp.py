"""torch's distributed checkpoints: every rank writes its share, for models that no host can hold.

    snapshots/E7_U140_S8960/   encoder.dcp/__0_0.distcp  encoder.dcp/__1_0.distcp  encoder.dcp/.metadata  snapshot.json

What is no tensor lies in a file beside the folder, `encoder.pt`, since torch would unpickle it without a check. A
tensor with several names is written once; `encoder.tied.json` has its further names.

The capture plans who writes what. Here each rank writes its part of the plan, and rank 0 writes the index, so nothing
here is a collective.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from keepbest.formats import torch_file
from keepbest.formats.digested_files import DigestedFiles, writer_into
from keepbest.formats.format import Format, Receipt, ToWrite, special_kind
from keepbest.formats.sharded_part import ShardedPart
from keepbest.formats.tied import read_ties, write_ties
from keepbest.run.files import Files
from keepbest.run.manifest import FileRecord
from keepbest.run.names import part_name

_ENDING = ".dcp"
_TIES_ENDING = ".tied.json"


@dataclass(frozen=True, slots=True)
class SharePlan:
    """What one rank writes of a part, by torch's planner.

    Attributes:
        planner: Planner that has the tensors of this rank.
        plan: Items that this rank writes, before the planner finishes them.
        metadata: What is known of the whole; on rank 0 alone it says anything.
        tied: Further names of the tensors, and the key of each.
    """

    planner: SavePlanner
    plan: SavePlan
    metadata: Metadata
    tied: Mapping[str, str]


class DistributedCheckpoint(Format):
    """A folder for each part, which `torch.distributed.checkpoint.load` reads."""

    name = "dcp"
    capture = "local"

    def cannot_hold(self, key: str, value: object) -> str | None:
        del key
        if isinstance(value, torch.Tensor) and (kind := special_kind(value)):
            return f"is {kind}, which format 'dcp' cannot hold; use format 'torch'"
        # Of these torch cannot plan the shares.
        if isinstance(value, torch.Tensor) and str(value.dtype).startswith("torch.bits"):
            return f"is {value.dtype}, which format 'dcp' cannot hold; use format 'torch'"
        return None

    def write(self, files: Files, folder: Path, share: ToWrite) -> Receipt:
        records: dict[str, FileRecord] = {}
        written: dict[str, list[WriteResult]] = {}
        for part, state in share.files.items():
            inside = folder / _folder_name(part)
            files.make_folder(inside)
            planned: SharePlan = share.plans[part]
            disk = DigestedFiles(files, is_waited_for=share.is_waited_for)
            plan = planned.planner.finish_plan(planned.plan)
            written[part] = []
            if plan.items:  # torch would leave an empty file where there is nothing to write
                with torch_file.without_crc32():
                    written[part] = writer_into(inside, disk).write_data(plan, planned.planner).wait()
            records |= _records(part, inside, disk)
            if state:
                path = folder / _file_of_others(part)
                digest = torch_file.FORMAT.write_file(files, path, state, is_waited_for=share.is_waited_for)
                records[path.name] = FileRecord(part, digest, 0)
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
            disk = DigestedFiles(files, is_waited_for=share.is_waited_for)
            # torch notes in it where things lie, and it is used again.
            writer_into(inside, disk).finish(replace(planned.metadata), [each[part] for each in results])
            records |= _records(part, inside, disk)
            files.sync_folder(inside)
            if planned.tied:
                path = folder / _file_of_ties(part)
                records[path.name] = FileRecord(part, write_ties(files, path, planned.tied))
        return records

    def reader(self, folder: Path, files: Mapping[str, FileRecord], part: str) -> ShardedPart:
        others, ties = _file_of_others(part), _file_of_ties(part)
        return ShardedPart(
            folder / _folder_name(part),
            files=frozenset(name for name, record in files.items() if record.part == part),
            others=torch_file.FORMAT.read_file(folder / others) if others in files else {},
            tied=read_ties(folder / ties) if ties in files else {},
        )


FORMAT = DistributedCheckpoint()


def _records(part: str, inside: Path, disk: DigestedFiles) -> dict[str, FileRecord]:
    return {f"{inside.name}/{name}": FileRecord(part, digest) for name, digest in sorted(disk.digests.items())}


def _folder_name(part: str) -> str:
    return f"{part_name(part)}{_ENDING}"


def _file_of_others(part: str) -> str:
    return f"{part_name(part)}{torch_file.FORMAT.ending}"


def _file_of_ties(part: str) -> str:
    return f"{part_name(part)}{_TIES_ENDING}"

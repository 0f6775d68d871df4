"""Snapshots that every rank writes a share of, by torch's distributed checkpoints: for models that no host can hold.

    snapshots/E7_U140_S8960/   encoder.dcp/__0_0.distcp  encoder.dcp/__1_0.distcp  encoder.dcp/.metadata  snapshot.json

What is no tensor lies in a file beside the folder, which torch would unpickle without a check.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from keepbest.capture.gathered import Weights
from keepbest.capture.local import quiet, sharded_fsdp1_state, sharded_state_dict
from keepbest.capture.restore import compare
from keepbest.errors import RankFailedError, SnapshotError, StorageError
from keepbest.formats.format import SHARDED_ENDING, SHARDED_METADATA
from keepbest.formats.torch_file import ENDING, read_state_dict, without_crc32, write_state_dict
from keepbest.modules.kinds import is_dtensor
from keepbest.modules.parts import Part
from keepbest.modules.sources import Source, StateDict, list_sources
from keepbest.modules.wrappers import state_dict_key
from keepbest.ranks import Ranks
from keepbest.run.digest import check_file, digest_file
from keepbest.run.files import Files
from keepbest.run.names import part_name


@contextmanager
def one_error(step: str, ranks: Ranks, error_class: type[RankFailedError | SnapshotError]) -> Iterator[None]:
    """Turns what torch's checkpoints raise on every rank, which is not even an `Exception`, into an error of ours.

    Raises:
        KeepBestError: of `error_class`, naming ranks and causes; or as `Ranks.lose`, for what one rank raised alone.
    """
    try:
        with quiet():
            yield
    except CheckpointException as error:
        causes = "; ".join(f"rank {rank}: {cause[0]!r}" for rank, cause in sorted(error.failures.items()))
        raise error_class(f"could not {step}: {causes}") from error
    except BaseException as error:  # noqa: BLE001  # lose raises
        ranks.lose(step, error)


@quiet()
def write_shards(folder: Path, token: str, weights: Weights, ranks: Ranks, step: str) -> dict[str, Any]:
    """Let every rank write what it holds of `weights` into `folder`. **Collective**.

    Args:
        folder: made by rank 0.
        token: name of an empty file in it, by which the other ranks know that it is the same folder.
        weights: from `take_shards`.
        ranks: of the model.
        step: what is being done, in words.

    Returns:
        What is recorded of each file, by its name in `folder`; the same on every rank.

    Raises:
        StorageError: on every rank, if a rank does not see the folder, or cannot write into it.
        RankFailedError: on every rank, if something else went wrong on one.
    """
    files, group = Files(), ranks.patient_group()
    ranks.agree(step, lambda: _see(folder, token), remedy=_NOT_SHARED)
    written: dict[str, Any] = {}
    for part, state in weights.files.items():
        inside = folder / f"{part_name(part)}{SHARDED_ENDING}"
        # What is not sharded is rank 0's, as in the other formats: the buffers of DDP differ between ranks.
        tensors = {
            key: value
            for key, value in state.items()
            if isinstance(value, torch.Tensor) and (ranks.is_main or _is_sharded(value))
        }
        others = {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
        ranks.agree(step, lambda inside=inside: files.make_folder(inside) if ranks.is_main else None)  # type: ignore[misc]
        with one_error(step, ranks, StorageError), without_crc32():
            save(tensors, storage_writer=FileSystemWriter(inside), process_group=group, no_dist=group is None)

        def record(part: str = part, inside: Path = inside, others: StateDict = others) -> dict[str, Any]:
            files.sync_folder(inside)
            mine = sorted(inside.glob(f"__{ranks.rank}_*"))
            mine += [inside / SHARDED_METADATA] if ranks.is_main else []
            records = {f"{inside.name}/{path.name}": {"part": part, **digest_file(path)} for path in mine}
            if others and ranks.is_main:
                path = folder / f"{part_name(part)}{ENDING}"
                records[path.name] = {"part": part, **write_state_dict(files, path, others)}
            return records

        for records in ranks.gather_json(step, record, remedy=_NOT_SHARED, saving=True):
            written |= records
    return written


def _is_sharded(value: torch.Tensor) -> bool:
    return is_dtensor(value) or hasattr(value, "local_shards")  # the tensors of FSDP1 have those


_NOT_SHARED = "Format 'dcp' needs a run directory on a file system that all hosts share and may write to"


def _see(folder: Path, token: str) -> None:
    if not (folder / token).is_file():
        raise OSError(f"{folder} is not the folder that rank 0 made: it has no {token}")


@quiet()
def load_shards(
    folder: Path,
    model: nn.Module,
    parts: Sequence[Part],
    files: Mapping[str, Any],
    left_out: Mapping[str, Sequence[str]],
    *,
    ranks: Ranks,
    step: str,
    is_shared: bool = True,
) -> None:
    """Load what `write_shards` wrote, each rank its shards of it. **Collective**.

    Every rank verifies its share of the files first, or all of them, if others do not see the same ones.

    Args:
        folder: of the snapshot, or this rank's copy of it.
        model: plain or wrapped; another strategy and another number of ranks than saved it are fine.
        parts: what was saved.
        files: what is recorded of each file.
        left_out: the keys of each part that were not saved; exactly these may be missing.
        ranks: of the model.
        step: what is being done, in words.
        is_shared: whether the ranks see one folder, or each has a copy of its own.

    Raises:
        SnapshotError: on every rank, if a file is missing or damaged, or keys or shapes differ from the model's; the
            model is then as it was.
        RankFailedError: on every rank, if reading fails later; parts may be loaded then.
    """
    group = ranks.patient_group()

    def verify() -> None:
        for name in sorted(files)[ranks.rank :: ranks.world_size] if is_shared else files:
            check_file(folder / name, files[name])

    def find() -> tuple[list[Source], dict[str, StateDict]]:
        return list_sources(model, parts, save_frozen_weights=True), {part.name: _saved(folder, part) for part in parts}

    ranks.agree(step, verify, saving=True)
    sources, saved = ranks.agree(step, find)
    state = _state_of(sources, ranks, step)
    ranks.agree(step, lambda: [compare(source, state[source.path], saved, left_out) for source in sources])
    for source in sources:
        # Not what was compared: FSDP1 gives copies, in which what was loaded since would be missing.
        present = _state_of([source], ranks, step)[source.path]
        for part in source.parts:
            wanted = {
                key: present[source.path_of(part) + key]
                for key, value in saved[part.name].items()
                if isinstance(value, torch.Tensor)
            }
            reader = FileSystemReader(folder / f"{part_name(part.name)}{SHARDED_ENDING}")
            with one_error(step, ranks, SnapshotError):
                load(wanted, storage_reader=reader, process_group=group, no_dist=group is None)
        _place(source, present, saved, ranks, step)


def _state_of(sources: Sequence[Source], ranks: Ranks, step: str) -> dict[str, StateDict]:
    try:
        return {source.path: sharded_state_dict(source) for source in sources}
    except BaseException as error:  # noqa: BLE001  # lose raises
        ranks.lose(step, error)


def _place(source: Source, present: StateDict, saved: Mapping[str, StateDict], ranks: Ranks, step: str) -> None:
    """Bring in what is no tensor, and FSDP1's shards. The other tensors of the model have been loaded into."""
    others = {
        source.path_of(part) + key: value
        for part in source.parts
        for key, value in saved[part.name].items()
        if not isinstance(value, torch.Tensor)
    }
    if source.holds_fsdp1:
        whole = {state_dict_key(source.module, key): value for key, value in {**present, **others}.items()}
        try:
            with sharded_fsdp1_state(source.module):
                source.module.load_state_dict(whole, strict=False)
        except BaseException as error:  # noqa: BLE001  # lose raises
            ranks.lose(step, error)
    elif others:
        named = {state_dict_key(source.module, key): value for key, value in others.items()}
        ranks.agree(step, lambda: source.module.load_state_dict(named, strict=False))


def read_layout(folder: Path, part: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of each tensor of a part in the snapshot `folder`. **Rank-local**.

    Raises:
        SnapshotError: if the folder of the part cannot be read.
    """
    path = folder / f"{part_name(part)}{SHARDED_ENDING}"
    try:
        metadata = FileSystemReader(path).read_metadata()
    except Exception as error:
        raise SnapshotError(f"{path} cannot be read as a distributed checkpoint: {error!r}") from error
    layout = {}
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise SnapshotError(f"{path} holds {key!r}, which is no tensor")
        layout[key] = (entry.size, entry.properties.dtype)
    return layout


def read_tensor(folder: Path, part: str, key: str, into: torch.Tensor) -> torch.Tensor:
    """One whole tensor of a part in the snapshot `folder`, read into `into`. **Rank-local**."""
    with quiet():
        load({key: into}, storage_reader=FileSystemReader(folder / f"{part_name(part)}{SHARDED_ENDING}"), no_dist=True)
    return into


def read_others(folder: Path, part: str) -> StateDict:
    """What is no tensor in a part of the snapshot `folder`. **Rank-local**. Raises `SnapshotError`."""
    path = folder / f"{part_name(part)}{ENDING}"
    return read_state_dict(path) if path.exists() else {}


def _saved(folder: Path, part: Part) -> StateDict:
    # Of tensors only shapes and dtypes are compared: stand-ins that take no memory.
    layout = read_layout(folder, part.name).items()
    tensors = {key: torch.empty((), dtype=dtype).expand(size) for key, (size, dtype) in layout}
    return {**tensors, **read_others(folder, part.name)}

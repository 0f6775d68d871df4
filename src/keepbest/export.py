"""From a snapshot of any format to the file, or folder, that others read, one tensor at a time. **Rank-local**."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from keepbest.errors import ConfigError, SnapshotError
from keepbest.formats import torch_file
from keepbest.formats.dcp import read_layout, read_others, read_tensor
from keepbest.formats.format import FILE_FORMATS, is_sharded, read_state_dict
from keepbest.formats.safetensors_file import Entry, entries_of, write_entries
from keepbest.remote.download import local_copy, snapshot_of
from keepbest.run.digest import check_file
from keepbest.run.files import Files
from keepbest.run.layout import TEMPORARY
from keepbest.run.reader import read_history, read_manifest

_LARGEST_FILE = 5_000_000_000  # bytes of one file of a folder, as `save_pretrained` has it
_FOLDER_FILE = "model"


class Contents(NamedTuple):
    """What is exported: tensors that are read when their turn comes, and everything else."""

    entries: list[Entry]
    tied: dict[str, str]
    others: dict[str, Any]


def export(
    run: Path | str, ref: str, to: Path, *, part: str | None = None, largest_file: int = _LARGEST_FILE
) -> list[Path]:
    """Write the weights that `ref` names to `to`, after every file was verified.

    Keys are those of the whole model; those of the part, if it is the only one or is named by `part`.

    Args:
        run: directory of the run, or the URL of its remote copy.
        ref: for example `best_model.loss.val.total`.
        to: a file that ends in `.pt` or `.safetensors`; any other path is a folder of safetensors files with an index,
            as `from_pretrained` reads them.
        part: name of one part of the model; `None` exports all of them.
        largest_file: bytes of one file in a folder.

    Returns:
        The files that were written.

    Raises:
        ConfigError: if something is there already, there is no such part, or a package that is needed is missing.
        SnapshotError: if there is no such run or ref, or a file is missing or damaged.
        OSError: whatever the file system answers; nothing is left at `to` then.
    """
    with local_copy(run, snapshot_of(ref)) as directory:
        return _export(directory, ref, to, part, largest_file)


def _export(directory: Path, ref: str, to: Path, part: str | None, largest_file: int) -> list[Path]:
    folder, manifest = read_manifest(directory, read_history(directory), ref)
    if to.suffix in (FILE_FORMATS["torch"].ending, FILE_FORMATS["safetensors"].ending) and to.exists():
        raise ConfigError(f"{to} exists; nothing is overwritten")
    parts = _parts(manifest, part)
    for name, entry in manifest["files"].items():
        if entry["part"] in parts:
            check_file(folder / name, entry)
    contents = _contents(folder, manifest, parts)
    if to.suffix == torch_file.ENDING:
        return [_write_torch(to, contents)]
    if contents.others:
        names = ", ".join(sorted(contents.others))
        raise SnapshotError(f"safetensors files hold tensors only, but the snapshot has {names}; export to a .pt file")
    if to.suffix == FILE_FORMATS["safetensors"].ending:
        with _appearing(to) as path:
            write_entries(Files(), path, contents.entries, contents.tied)
        return [to]
    return _write_folder(to, contents, largest_file)


def _parts(manifest: dict[str, Any], part: str | None) -> dict[str, str]:
    """For each part that is exported what its keys begin with."""
    saved = {entry["part"] for entry in manifest["files"].values()}
    paths = {name: path for name, path, _ in manifest["parts"] if name in saved}
    if part is not None:
        if part not in paths:
            raise ConfigError(f"the snapshot has no part {part!r}; there are: {', '.join(sorted(paths))}")
        return {part: ""}
    if len(paths) == 1:
        return dict.fromkeys(paths, "")
    return {name: f"{path}." if path else "" for name, path in paths.items()}


def _contents(folder: Path, manifest: dict[str, Any], parts: Mapping[str, str]) -> Contents:
    contents = Contents([], {}, {})
    for name, prefix in parts.items():
        state: dict[str, Any]
        if is_sharded(manifest["files"]):
            state = read_others(folder, name)
            for key, (shape, dtype) in read_layout(folder, name).items():
                fetch = partial(_read_alone, folder, name, key, shape, dtype)
                contents.entries.append(Entry(prefix + key, shape, dtype, fetch))
        else:
            [file] = [file for file, entry in manifest["files"].items() if entry["part"] == name]
            state = read_state_dict(folder / file)
            tensors = {prefix + key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
            entries, tied = entries_of(tensors)
            contents.entries.extend(entries)
            contents.tied.update(tied)
        contents.others.update(
            {prefix + key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
        )
    return contents


def _read_alone(folder: Path, part: str, key: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return read_tensor(folder, part, key, torch.empty(shape, dtype=dtype))


def _write_torch(to: Path, contents: Contents) -> Path:
    to.parent.mkdir(parents=True, exist_ok=True)
    # torch.save wants all tensors at once: they lie in a file that is mapped, so that the memory is that of the disk.
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=TEMPORARY) as space, _appearing(to) as path:
        state = {entry.key: _mapped(Path(space) / str(number), entry) for number, entry in enumerate(contents.entries)}
        state |= {key: state[first] for key, first in contents.tied.items()}
        torch_file.write_state_dict(Files(), path, {**state, **contents.others})
    return to


def _mapped(path: Path, entry: Entry) -> torch.Tensor:
    count = torch.Size(entry.shape).numel()
    if count == 0:
        return entry.fetch()
    mapped = torch.from_file(str(path), shared=True, size=count, dtype=entry.dtype).view(entry.shape)
    return mapped.copy_(entry.fetch())


def _write_folder(to: Path, contents: Contents, largest_file: int) -> list[Path]:
    ending = FILE_FORMATS["safetensors"].ending
    if to.exists() and any(to.glob(f"{_FOLDER_FILE}*{ending}*")):
        raise ConfigError(f"{to} holds weights; nothing is overwritten")
    groups = _grouped(contents.entries, largest_file)
    names = [f"{_FOLDER_FILE}-{number:05}-of-{len(groups):05}{ending}" for number in range(1, len(groups) + 1)]
    if len(groups) == 1:
        names = [f"{_FOLDER_FILE}{ending}"]
    written: list[Path] = []
    try:
        for name, group in zip(names, groups, strict=True):
            keys = {entry.key for entry in group}
            with _appearing(to / name) as path:
                write_entries(
                    Files(), path, group, {key: first for key, first in contents.tied.items() if first in keys}
                )
            written.append(to / name)
        if len(groups) > 1:
            written.append(_write_index(to, contents, names, groups))
    except BaseException:
        for path in written:
            Files().remove(path)
        raise
    return written


def _write_index(to: Path, contents: Contents, names: Sequence[str], groups: Sequence[Sequence[Entry]]) -> Path:
    index = {
        "metadata": {"total_size": sum(entry.bytes for entry in contents.entries)},
        "weight_map": {entry.key: name for name, group in zip(names, groups, strict=True) for entry in group},
    }
    found = to / f"{_FOLDER_FILE}{FILE_FORMATS['safetensors'].ending}.index.json"
    with _appearing(found) as path, Files().create(path) as file:
        file.write(json.dumps(index, indent=2, sort_keys=True).encode())
        file.sync()
    return found


def _grouped(entries: Sequence[Entry], largest: int) -> list[list[Entry]]:
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + entry.bytes > largest:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.bytes
    return groups


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """Another path to write to; what was written there has the name `path` when the block has ended, and only then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    files = Files()
    files.remove(temporary)
    try:
        yield temporary
        files.rename(temporary, path)
        files.sync_folder(path.parent)
    except BaseException:
        files.remove(temporary)
        raise

"""From a snapshot of any format to the file, or folder, that others read, one tensor at a time. **Rank-local**."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from keepbest.capture.contents import PartContents, whole_key
from keepbest.capture.selection import Selection, chosen_parts, unread_parts
from keepbest.errors import ConfigError, SnapshotError
from keepbest.formats import safetensors_file, torch_file
from keepbest.formats.entries import FileEntry, fetched
from keepbest.formats.registry import find_format
from keepbest.formats.safetensors_file import write_entries
from keepbest.modules.state_dicts import Version, with_versions
from keepbest.remote.download import snapshot_of
from keepbest.remote.live import read_snapshots
from keepbest.remote.storage import local_path
from keepbest.run.appearing import appearing, made_for, name_all, naming_alone, space_beside
from keepbest.run.files import Files
from keepbest.run.history import History
from keepbest.run.manifest import Manifest
from keepbest.run.place import check_can_be_made, check_is_outside
from keepbest.run.reader import FoundSnapshot, find_ref

_LARGEST_FILE = 5_000_000_000  # bytes of one file of a folder, as `save_pretrained` has it
_FOLDER_FILE = "model"
_TORCH_ENDINGS = (torch_file.FORMAT.ending, ".pth")
_OTHER_ENDINGS = (".bin", ".ckpt", ".h5", ".npz", ".onnx", ".pickle", ".pkl", ".tar", ".zip")
_files = Files()


class Contents(NamedTuple):
    """What is exported.

    Attributes:
        entries: Tensors, each read when its turn comes.
        tied: Further names of these tensors, and the key of each.
        others: What is no tensor.
        versions: Versions of modules that are recorded, by their paths; `None` if none were recorded.
    """

    entries: list[FileEntry]
    tied: dict[str, str]
    others: dict[str, Any]
    versions: dict[str, Version] | None = None


def export(
    run: Path | str,
    ref: str,
    to: Path | str,
    *,
    part: str | None = None,
    only: str | Sequence[str] | None = None,
    largest_file: int = _LARGEST_FILE,
) -> list[Path]:
    """Write the weights that `ref` names to `to`, after every file that is read was verified.

    Keys are those of the whole model; those of the part, if it is the only one or is named by `part`.

    Args:
        run: Directory of the run, or the URL of its remote copy.
        ref: Name of the ref, for example `best_model.loss.val.total`.
        to: File that ends in `.pt`, `.pth` or `.safetensors`. Any other path is a folder of safetensors files with an
            index, as `from_pretrained` reads them.
        part: Name of one part of the model; `None` exports all of them.
        only: Dotted path in the whole model, or several, of what is exported: a submodule or a weight. `None` is
            everything. Keys are the same as without it.
        largest_file: Bytes of one file in a folder.

    Returns:
        The files that were written.

    Raises:
        ConfigError: If something is there already, `to` ends like a file of another kind, there is no such part or
            path, or a package that is needed is missing.
        SnapshotError: If there is no such run or ref, or a file is missing or damaged.
        OSError: Any refusal of the file system. Nothing is left at `to` then.
    """
    selection = Selection.of(only)
    files = partial(exported_files, part=part, selection=selection)

    def read(directory: Path, history: History) -> list[Path]:
        found, path = find_ref(directory, history, ref), local_path(to, "to")
        check_target(path)
        return write_contents(path, verified_contents(found, part, selection), largest_file)

    return read_snapshots(run, snapshot_of(ref), read, files=files)


def exported_files(manifest: Manifest, *, part: str | None, selection: Selection) -> list[str]:
    """The names of the files of a snapshot that are read."""
    names = {each.name for each in chosen_parts(manifest, selection)}
    return manifest.files_in(names if part is None else names & {part})


def check_target(to: Path) -> None:
    """Check that something can be written to `to`. Raises `ConfigError`."""
    if _ending(to) in _OTHER_ENDINGS:
        raise ConfigError(
            f"{to} ends in {to.suffix}, which is no kind of file that is written here: choose .pt or .pth for "
            "torch.load, .safetensors, or a folder without such an ending"
        )
    check_can_be_made(to.parent)
    check_is_outside(to)
    if (_ending(to) in (*_TORCH_ENDINGS, safetensors_file.FORMAT.ending) and to.exists()) or to.is_file():
        raise ConfigError(f"{to} exists; nothing is overwritten")


def verified_contents(found: FoundSnapshot, part: str | None, selection: Selection) -> Contents:
    """What is exported of a snapshot, after its files were verified. Raises `ConfigError` and `SnapshotError`."""
    parts = _parts(found.manifest, part)
    found.check_before_use(parts={each.name for each in chosen_parts(found.manifest, selection)} & parts.keys())
    return _contents(found, parts, selection)


def write_contents(to: Path, contents: Contents, largest_file: int = _LARGEST_FILE) -> list[Path]:
    """Write to a file or folder, as `export` does. Returns the files that were written. Raises as `export`."""
    if _ending(to) in _TORCH_ENDINGS:
        return [_write_torch(to, contents)]
    if contents.others:
        names = ", ".join(sorted(contents.others))
        raise SnapshotError(f"safetensors files hold tensors only, but the snapshot has {names}; export to a .pt file")
    if _ending(to) == safetensors_file.FORMAT.ending:
        with appearing(to, _files) as path:
            write_entries(_files, path, contents.entries, contents.tied, is_waited_for=True)
        return [to]
    return _write_folder(to, contents, largest_file)


def _ending(to: Path) -> str:
    return to.suffix.lower()  # as people write it on systems that do not distinguish


def _parts(manifest: Manifest, part: str | None) -> dict[str, str]:
    """For each part that is exported what its keys begin with."""
    paths = {saved.name: saved.path for saved in manifest.saved_parts}
    if part is not None:
        if part not in paths:
            raise ConfigError(f"the snapshot has no part {part!r}; there are: {', '.join(sorted(paths))}")
        return {part: ""}
    if len(paths) == 1:
        return dict.fromkeys(paths, "")
    return {name: f"{path}." if path else "" for name, path in paths.items()}


def _contents(found: FoundSnapshot, parts: Mapping[str, str], selection: Selection) -> Contents:
    manifest = found.manifest
    contents = Contents([], {}, {}, _versions(manifest, parts))
    places = {each.name: each for each in chosen_parts(manifest, selection) if each.name in parts}
    readers = {name: find_format(manifest.format).reader(found.folder, manifest.files, name) for name in places}
    whole = {name: PartContents.of(places[name], reader) for name, reader in readers.items()}
    unread = (each.path for each in unread_parts(manifest, selection) if each.name in parts and each.path)
    selection.check([*(whole_key(each.part, key) for each in whole.values() for key in each.names_to_keys), *unread])
    stored: dict[str, str] = {}  # for each name the key of its entry, since parts may overlap
    for name, part in places.items():
        reader, prefix = readers[name], parts[name]
        for key, names in whole[name].names.items():
            chosen = [prefix + each for each in names if selection.holds(whole_key(part, each))]
            if chosen and key in reader.others:
                contents.others.update(dict.fromkeys(chosen, reader.others[key]))
            elif chosen:
                first = next((stored[each] for each in chosen if each in stored), chosen[0])
                if first not in stored:
                    contents.entries.append(FileEntry(first, *reader.kinds[key], partial(reader.fetch, key)))
                further = [each for each in chosen if each not in stored]
                stored.update(dict.fromkeys(further, first))
                contents.tied.update({each: first for each in further if each != first})
    return contents


def _versions(manifest: Manifest, parts: Mapping[str, str]) -> dict[str, Version] | None:
    if manifest.versions is None:
        return None
    recorded = ((parts[part], modules) for part, modules in manifest.versions.items() if part in parts)
    return {
        f"{prefix}{path}".removesuffix("."): version
        for prefix, modules in recorded
        for path, version in modules.items()
    }


def _write_torch(to: Path, contents: Contents) -> Path:
    with appearing(to, _files) as path:
        _save(path, contents)
    return to


def _save(path: Path, contents: Contents) -> None:
    # torch.save wants all tensors at once: they lie in one mapped file, so that the memory is that of the disk.
    state = fetched(contents.entries, path.with_name("tensors"))
    state |= {key: state[first] for key, first in contents.tied.items()}
    state |= contents.others
    versioned = state if contents.versions is None else with_versions(state, contents.versions)
    torch_file.FORMAT.write_file(_files, path, versioned, is_waited_for=True)


def _write_folder(to: Path, contents: Contents, largest_file: int) -> list[Path]:
    ending = safetensors_file.FORMAT.ending
    _refuse_if_full(to)
    groups = _grouped(contents.entries, largest_file)
    names = [f"{_FOLDER_FILE}-{number:05}-of-{len(groups):05}{ending}" for number in range(1, len(groups) + 1)]
    if len(groups) == 1:
        names = [f"{_FOLDER_FILE}{ending}"]
    with made_for(to), space_beside(to / _FOLDER_FILE, _files) as space:
        written = [space / name for name in names]
        for path, group in zip(written, groups, strict=True):
            keys = {entry.key for entry in group}
            tied = {key: first for key, first in contents.tied.items() if first in keys}
            write_entries(_files, path, group, tied, is_waited_for=True)
        if len(groups) > 1:
            written.append(_write_index(space, contents, names, groups))  # last, since it says that all is there
        with naming_alone(to):
            _refuse_if_full(to)  # by now: files of other sizes have other names
            return name_all(written, to, _files)


def _refuse_if_full(to: Path) -> None:
    if any(to.glob(f"{_FOLDER_FILE}*{safetensors_file.FORMAT.ending}*")):
        raise ConfigError(f"{to} holds weights; nothing is overwritten")


def _write_index(folder: Path, contents: Contents, names: Sequence[str], groups: Sequence[Sequence[FileEntry]]) -> Path:
    index = {
        "metadata": {"total_size": sum(entry.bytes for entry in contents.entries)},
        "weight_map": {entry.key: name for name, group in zip(names, groups, strict=True) for entry in group},
    }
    path = folder / f"{_FOLDER_FILE}{safetensors_file.FORMAT.ending}.index.json"
    with _files.create(path) as file:
        file.write(json.dumps(index, indent=2, sort_keys=True).encode())
        file.sync()
    return path


def _grouped(entries: Sequence[FileEntry], largest: int) -> list[list[FileEntry]]:
    groups: list[list[FileEntry]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + entry.bytes > largest:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.bytes
    return groups

"""Reading a run folder without owning it: refs from the ledger, manifests, verified weights. **Rank-local**."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from keepbest.errors import SnapshotError
from keepbest.formats.format import SHARDED_ENDING, SHARDED_METADATA, read_state_dict
from keepbest.iteration import TrainingIteration
from keepbest.run.digest import check_file
from keepbest.run.history import History
from keepbest.run.layout import CHECKPOINTS, LEDGER, MANIFEST, SNAPSHOTS
from keepbest.run.ledger import read_ledger
from keepbest.run.names import is_safe
from keepbest.run.snapshot_folder import manifest_digest


def ledger_exists(directory: Path) -> bool:
    """Whether there is a ledger in `directory`."""
    return (directory / CHECKPOINTS / LEDGER).is_file()


def read_history(directory: Path) -> History:
    """What the ledger of the run in `directory` tells.

    Raises:
        SnapshotError: if there is no ledger.
        LedgerError: if it is damaged or of another format.
    """
    path = directory / CHECKPOINTS / LEDGER
    lines, _ = read_ledger(path)
    if not lines:
        raise SnapshotError(f"{path} is missing or empty: {directory} is not the directory of a run with checkpoints")
    return History.of(lines)


def read_manifest(directory: Path, history: History, ref: str) -> tuple[Path, dict[str, Any]]:
    """Folder and manifest of the snapshot that `ref` names; the manifest is compared with the ledger.

    Raises:
        SnapshotError: if there is no such ref (it lists those that exist), or the manifest is missing or damaged.
    """
    if ref not in history.refs:
        known = ", ".join(sorted(history.refs)) or "none yet"
        raise SnapshotError(f"{directory} has no ref {ref!r}; there are: {known}")
    return read_snapshot_manifest(directory, history, history.refs[ref])


def read_snapshot_manifest(directory: Path, history: History, snapshot: str) -> tuple[Path, dict[str, Any]]:
    """Folder and manifest of `snapshot`. Raises as `read_manifest`."""
    folder = directory / CHECKPOINTS / SNAPSHOTS / snapshot
    return folder, manifest_in(folder, history.manifests.get(snapshot))


def manifest_in(folder: Path, digest: str | None) -> dict[str, Any]:
    """The manifest of the snapshot in `folder`, which the ledger knows by this digest. Raises as `read_manifest`."""
    try:
        text = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise SnapshotError(f"snapshot {folder.name} cannot be read: {error}") from error
    if manifest_digest(text) != digest:
        raise SnapshotError(f"{folder / MANIFEST} is damaged: it is not what the ledger recorded")
    try:
        return _checked(json.loads(text))
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise SnapshotError(f"{folder / MANIFEST} makes no sense: {error!r}") from error


def _checked(manifest: dict[str, Any]) -> dict[str, Any]:
    """`manifest`, after everything that readers ask of it was found in it."""
    if outside := [name for name in manifest["files"] if not _is_inside(name)]:
        raise ValueError(f"it names files outside of its folder: {', '.join(outside)}")
    parts = set()
    for name, path, apart in manifest["parts"]:
        if not all(isinstance(text, str) for text in (name, path, *apart)):
            raise ValueError(f"this is no part of a model: {name!r}, {path!r}, {apart!r}")
        parts.add(name)
    for entry in manifest["files"].values():
        if entry["part"] not in parts or not isinstance(entry["digest"], str) or not isinstance(entry["bytes"], int):
            raise ValueError(f"this is no file of a snapshot: {entry!r}")
    for name, keys in manifest["left_out"].items():
        if name not in parts or not all(isinstance(key, str) for key in keys):
            raise ValueError(f"these are no weights of a part: {name!r}: {keys!r}")
    TrainingIteration.parse(manifest["iteration"])
    if not isinstance(manifest["metric_key"], str) or not isinstance(manifest["value"], float | int):
        raise TypeError("it does not tell the metric and its value")
    return manifest


def _is_inside(name: str) -> bool:
    # Either a file, or one of torch's in the folder of a part.
    folder, slash, file = name.rpartition("/")
    if not slash:
        return is_safe(name)
    return is_safe(folder) and folder.endswith(SHARDED_ENDING) and (is_safe(file) or file == SHARDED_METADATA)


def read_weights(folder: Path, manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The state dict of each part of a snapshot that rank 0 wrote, every file verified before it is opened.

    Raises:
        SnapshotError: if a file is missing, damaged, or holds anything but weights.
        ConfigError: if a package that reads them is not installed.
    """
    for name, entry in manifest["files"].items():
        check_file(folder / name, entry)
    return {entry["part"]: read_state_dict(folder / name) for name, entry in manifest["files"].items()}

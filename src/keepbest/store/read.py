"""Reading a run folder without owning it: refs from the ledger, manifests, verified weights. **Rank-local**."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from keepbest.errors import SnapshotError
from keepbest.store.format import read_state_dict
from keepbest.store.history import History
from keepbest.store.layout import CHECKPOINTS, LEDGER, MANIFEST, SNAPSHOTS
from keepbest.store.ledger import read_ledger
from keepbest.store.names import is_safe
from keepbest.store.snapshots import manifest_digest


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
    try:
        text = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise SnapshotError(f"snapshot {snapshot} cannot be read: {error}") from error
    if manifest_digest(text) != history.manifests.get(snapshot):
        raise SnapshotError(f"{folder / MANIFEST} is damaged: it is not what the ledger recorded")
    manifest: dict[str, Any] = json.loads(text)
    if outside := [name for name in manifest["files"] if not is_safe(name)]:
        raise SnapshotError(f"{folder / MANIFEST} names files outside of its folder: {', '.join(outside)}")
    return folder, manifest


def read_weights(folder: Path, manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The state dict of each part of a snapshot, every file verified before it is opened.

    Raises:
        SnapshotError: if a file is missing, damaged, or holds anything but weights.
    """
    return {entry["part"]: read_state_dict(folder / name, entry) for name, entry in manifest["files"].items()}

"""What the refs of a run name. **Rank-local**, without a process group."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepbest.errors import SnapshotError
from keepbest.run.history import History, KeeperHistory
from keepbest.run.names import tolerance_ref, top_ref
from keepbest.run.reader import find_snapshot


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The checkpoint that a ref names.

    Attributes:
        ref: Name of the ref.
        metric_key: Key of the metric that the ref's keeper monitors.
        higher_is_better: Direction of the metric.
        value: Value of the metric; `None` if it is unknown.
        iteration: Iteration that the weights are from; `None` if the snapshot is damaged.
        tolerance: Tolerance that the ref belongs to; `None` for the best.
        exceeded: Whether the tolerance was exceeded. If not, the ref is provisional and names the best so far. `None`
            for the best.
        snapshot: Name of the folder.
        bytes: Number of bytes of all files together; `None` if the snapshot is damaged.
        digest: Digest of the manifest, which holds those of the files, and names the run. So that of another run is
            another one, even if the weights are equal.
        files: Bytes, digest and its algorithm, by file name. Empty if the snapshot is damaged.
        damage: Reason why the snapshot cannot be used; `None` if it can.
    """

    ref: str
    metric_key: str
    higher_is_better: bool
    value: float | None
    iteration: str | None
    tolerance: int | None
    exceeded: bool | None
    snapshot: str
    bytes: int | None
    digest: str
    files: dict[str, dict[str, Any]]
    damage: str | None = None


def read_checkpoints(directory: Path, history: History) -> dict[str, Checkpoint]:
    """Return the checkpoint of every ref of a keeper: for each the best, the tolerances, ascending, and the top k."""
    found = {}
    for name, keeper in history.keepers.items():
        # Once, since it goes through all that was observed.
        closed = keeper.present.state(keeper.policy, until=keeper.present.last_iteration).exceeded
        for ref, tolerance in _refs(history, name, keeper):
            found[ref] = _read_checkpoint(directory, history, ref, keeper, tolerance, closed)
    return found


def _refs(history: History, name: str, keeper: KeeperHistory) -> Iterator[tuple[str, int | None]]:
    if name in history.refs:
        yield name, None
    for tolerance in keeper.policy.tolerances:
        if (ref := tolerance_ref(name, tolerance)) in history.refs:
            yield ref, tolerance
    # There may be fewer of them than the policy keeps, which is any number that somebody wrote.
    for place in range(1, min(keeper.policy.top_k, len(history.refs)) + 1):
        if (ref := top_ref(name, place)) in history.refs:
            yield ref, None


def _read_checkpoint(
    directory: Path,
    history: History,
    ref: str,
    keeper: KeeperHistory,
    tolerance: int | None,
    closed: Container[int],
) -> Checkpoint:
    snapshot = history.refs[ref]
    damage, manifest = None, None
    try:
        manifest = find_snapshot(directory, history, history.refs[ref]).manifest
    except SnapshotError as error:
        damage = str(error)
    return Checkpoint(
        ref=ref,
        metric_key=keeper.metric_key,
        higher_is_better=keeper.policy.higher_is_better,
        value=_value(keeper, snapshot),
        iteration=None if manifest is None else str(manifest.iteration),
        tolerance=tolerance,
        exceeded=None if tolerance is None else tolerance in closed,
        snapshot=snapshot,
        bytes=None if manifest is None else manifest.total_bytes,
        digest=history.manifests[snapshot],
        files={} if manifest is None else {file: each.digest._asdict() for file, each in manifest.files.items()},
        damage=damage,
    )


def _value(keeper: KeeperHistory, snapshot: str) -> float | None:
    """Return the keeper's own value. The manifest of a snapshot that two keepers share holds that of one of them."""
    entries = (entry for timeline in reversed(keeper.timelines) for entry in timeline.entries)
    return next((entry.observation.value for entry in entries if entry.snapshot == snapshot), None)

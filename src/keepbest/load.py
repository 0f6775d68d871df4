"""`load`: bring what a ref names into a model."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from keepbest.capture.restore import place_weights
from keepbest.formats.format import is_sharded
from keepbest.iteration import TrainingIteration
from keepbest.modules.parts import Part
from keepbest.modules.sources import StateDict
from keepbest.ranks import Ranks
from keepbest.remote.download import local_copy, snapshot_of
from keepbest.remote.storage import is_remote
from keepbest.run.layout import CHECKPOINTS, SNAPSHOTS
from keepbest.run.reader import read_history, read_manifest, read_weights


@dataclass(frozen=True, slots=True)
class LoadedSnapshot:
    """What `load` brought into the model.

    Attributes:
        iteration: whose weights they are.
        metric_key: of the keeper that took the snapshot.
        value: of that metric at the iteration.
        parts: names of the parts that were loaded; what else the model has was left as it was.
        path: folder of the snapshot; `None` if it was read from a remote storage.
    """

    iteration: TrainingIteration
    metric_key: str
    value: float
    parts: tuple[str, ...]
    path: Path | None


def load(
    run: str | Path,
    ref: str,
    model: nn.Module,
    *,
    process_group: dist.ProcessGroup | None = None,
    rank_timeout: float = 120.0,
    save_timeout: float = 1800.0,
) -> LoadedSnapshot:
    """Load the snapshot that `ref` names into `model`, after every file of it was verified. **Collective**.

    Rank 0 reads, the others receive; of a snapshot of format `dcp` every rank reads its share. The model may be wrapped
    in another way, and on another number of ranks, than when it was saved.

    Args:
        run: directory of the run, or the URL of its remote copy.
        ref: for example `best_model.loss.val.total` or `best_model.loss.val.total.tolerance=5`.
        model: receives the parts that were saved.
        process_group: the ranks that hold the model; `None` is the default group, or one process.
        rank_timeout: seconds that ranks wait for each other.
        save_timeout: seconds that ranks wait for rank 0 to read.

    Raises:
        SnapshotError: on every rank, if there is no such run or ref, a file is missing or damaged, or the snapshot is
            of another model; the model is then as it was.
        LedgerError: on every rank, if the ledger is damaged or of another format.
        ConfigError: on every rank, if the URL cannot be opened here.
    """
    ranks = Ranks.connect(process_group, rank_timeout=rank_timeout, save_timeout=save_timeout)
    return load_into(model, run, ref, ranks=ranks)


def load_into(model: nn.Module, run: str | Path, ref: str, *, ranks: Ranks) -> LoadedSnapshot:
    """As `load`, for ranks that are connected already. **Collective**."""
    files: dict[str, StateDict] = {}

    def read() -> dict[str, Any]:
        with local_copy(run, snapshot_of(ref), files="unsharded") as directory:
            folder, manifest = read_manifest(directory, read_history(directory), ref)
            if not is_sharded(manifest["files"]):
                files.update(read_weights(folder, manifest))
            return {**manifest, "folder": folder.name}

    step = f"read {ref} of {run}"
    manifest = ranks.broadcast(step, read, saving=True)
    saved, left_out = {entry["part"] for entry in manifest["files"].values()}, manifest["left_out"]
    parts = tuple(Part(name, path, tuple(apart)) for name, path, apart in manifest["parts"] if name in saved)
    if is_sharded(manifest["files"]):
        from keepbest.formats.dcp import load_shards  # torch's distributed checkpoints take half a second to import

        with ExitStack() as stack:
            # Every rank reads, and ranks on other hosts would not see a copy of rank 0's.
            copy = local_copy(run, lambda _: {manifest["folder"]})
            directory = ranks.agree(step, lambda: stack.enter_context(copy), saving=True)
            folder = directory / CHECKPOINTS / SNAPSHOTS / manifest["folder"]
            load_shards(
                folder, model, parts, manifest["files"], left_out, ranks=ranks, step=step, is_shared=not is_remote(run)
            )
    else:
        place_weights(model, parts, files, left_out, ranks=ranks)
    return LoadedSnapshot(
        iteration=TrainingIteration.parse(manifest["iteration"]),
        metric_key=manifest["metric_key"],
        value=manifest["value"],
        parts=tuple(part.name for part in parts),
        path=None if is_remote(run) else Path(run) / CHECKPOINTS / SNAPSHOTS / manifest["folder"],
    )

"""`load`: bring what a ref names into a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from keepbest.capture.feed import Stored
from keepbest.capture.refusals import refuse_mode
from keepbest.capture.selection import Selection, chosen_parts
from keepbest.capture.states import Stateful, check_states
from keepbest.capture.ways import Way, find_way
from keepbest.errors import ConfigError, PartlyLoadedError, SnapshotError
from keepbest.formats.registry import find_format
from keepbest.iteration import TrainingIteration
from keepbest.modules.zero import whole_parameters
from keepbest.ranks import NO_REMEDY, Ranks
from keepbest.remote.download import TRIES, local_copy, snapshot_of
from keepbest.remote.live import named_now
from keepbest.remote.storage import place_of
from keepbest.run.layout import snapshots_folder
from keepbest.run.manifest import Manifest
from keepbest.run.reader import FoundSnapshot, find_ref, only_best, read_history


@dataclass(frozen=True, slots=True)
class LoadedSnapshot:
    """What `load` brought into the model.

    Attributes:
        iteration: Training iteration whose weights these are.
        metric_key: Metric of the keeper that took the snapshot; `None` for a resume checkpoint.
        value: Value of that metric at the iteration; `None` for a resume checkpoint.
        parts: Names of the parts of the model that were loaded.
        path: Folder of the snapshot; `None` if it was read from a remote storage.
        keys: Names in the model of the weights that were loaded.
        left_alone: Names of what this rank's model has beside them, and keeps as it was.
        unused: Names of what the snapshot has beside them: what `only` leaves out, the stages of other ranks, and the
            `_extra_state` of modules that have none in this model. A part of which nothing was read has one name.
        training_state: Names of the training states that were loaded.
        unused_training_state: Names of those that the snapshot has beside them.
    """

    iteration: TrainingIteration
    metric_key: str | None
    value: float | None
    parts: tuple[str, ...]
    path: Path | None
    keys: tuple[str, ...]
    left_alone: tuple[str, ...]
    unused: tuple[str, ...]
    training_state: tuple[str, ...]
    unused_training_state: tuple[str, ...]


class _Wanted(NamedTuple):
    """What is to be loaded: from which run, by which ref, which weights of it, and into which training states."""

    place: str | Path
    ref: str | None
    selection: Selection
    states: Mapping[str, Stateful]

    def files(self, manifest: Manifest) -> list[str]:
        """The files of a snapshot that are read."""
        return manifest.files_in({*self.states, *(part.name for part in chosen_parts(manifest, self.selection))})


def load(
    run: str | Path,
    ref: str | None = None,
    model: nn.Module | None = None,
    *,
    only: str | Sequence[str] | None = None,
    training_state: Mapping[str, Any] | None = None,
    process_group: dist.ProcessGroup | None = None,
    rank_timeout: float = 120.0,
    save_timeout: float = 1800.0,
) -> LoadedSnapshot:
    """Load the snapshot that `ref` names into `model`, after every file that is read was verified. **Collective**.

    Rank 0 reads, the others receive. Of a snapshot of format `dcp` every rank reads its share. The model may be wrapped
    in another way, and on another number of ranks, than when it was saved.

    The weights go through the model's own `load_state_dict`, so its hooks and overrides run. Ranks may hold models of
    different names, such as stages of a pipeline: each takes what it has, and together they must have all that was
    saved. Names end with `_extra_state` where a module keeps more than weights; these alone may have come or gone.
    Dtypes may differ where numbers stay what they are: floats are rounded, but none becomes infinite or an integer.

    Training states (`BestKeeper(training_state=...)`) are loaded where they are asked for. State of an optimizer goes
    by the names of parameters, so it also fits another strategy and number of ranks. Its groups must hold the same
    parameters as those that were saved, in any order.

    Args:
        run: Directory of the run, or the URL of its remote copy.
        ref: Name of the ref, for example `best_model.loss.val.total` or `best_model.loss.val.total.tolerance=5`.
            `None`, as in `load(run, model=model)`, is the best of a run that monitors one metric.
        model: Model that receives the parts that were saved.
        only: Dotted path, or several, of what is loaded: a submodule or a weight of the model. `None` is everything.
            Files of other parts are not read, and not downloaded.
        training_state: Objects that take the training states of these names, such as `{"optimizer": optimizer}`; the
            same names on every rank.
        process_group: Ranks that hold the model; `None` is the default group, or one process.
        rank_timeout: Seconds that ranks wait for each other.
        save_timeout: Seconds that ranks wait for rank 0 to read.

    Raises:
        SnapshotError: On every rank, if there is no such run or ref, a file is missing or damaged, or the snapshot is
            of another model: it lacks something, has something more, or has another shape that no module takes by
            itself, another layout or a dtype that loses numbers, or the model is on the meta device; or it lacks a
            training state, or has it with other parameters or groups. The model, and what `training_state` has, are
            then as they were.
        LedgerError: On every rank, if the ledger is damaged or of another version.
        ConfigError: On every rank, if the URL cannot be opened here, the snapshot has nothing that `only` names, an
            optimizer has parameters that are not in the model, no `ref` is given and there is not one best, or a mode
            of torch such as `FakeTensorMode` is on.
        RankFailedError: On every rank, if a `load_state_dict` raises, of the model or of what `training_state` has, or
            a file is lost while it is read. Parts may be loaded then.
    """
    ranks = Ranks.connect(process_group, rank_timeout=rank_timeout, save_timeout=save_timeout)
    step = f"read {ref or 'the best'} of {run}"
    return load_into(model, run, ref, ranks=ranks, step=step, only=only, training_state=training_state)


def load_into(
    model: nn.Module | None,
    run: str | Path,
    ref: str | None,
    *,
    ranks: Ranks,
    step: str,
    only: str | Sequence[str] | None = None,
    training_state: Mapping[str, Any] | None = None,
) -> LoadedSnapshot:
    """As `load`, for ranks that are connected already. **Collective**; `step` is the same on every rank."""
    selection, place, states, target = ranks.agree(
        step,
        lambda: (Selection.of(only), place_of(run), check_states(training_state, []), _check_model(model, ref)),
        state=lambda found: f"{found[0]} {list(found[2])}".encode(),
    )
    wanted = _Wanted(place, ref, selection, states)
    for attempt in range(TRIES):
        read: set[str] = set()  # the snapshot, on rank 0, once that is known
        try:
            return _load(target, wanted, read, ranks, step)
        except (SnapshotError, PartlyLoadedError):
            # A live run may have removed what its ledger named a moment ago.
            if attempt == TRIES - 1 or ranks.is_poisoned or not _is_exchanged(place, ref, read, ranks, step):
                raise
    raise RuntimeError("each attempt returns, raises, or is followed by another one")


def _is_exchanged(place: str | Path, ref: str | None, read: set[str], ranks: Ranks, step: str) -> bool:
    """Whether `ref` names something else by now than what rank 0 has read. **Collective**."""

    def is_exchanged() -> bool:
        return bool(read) and named_now(place, snapshot_of(ref)) != read

    answer: bool = ranks.broadcast(step, is_exchanged, remedy=NO_REMEDY, saving=True)
    return answer


def _load(target: nn.Module, wanted: _Wanted, read: set[str], ranks: Ranks, step: str) -> LoadedSnapshot:
    place, states = wanted.place, wanted.states
    # What is made in inference mode, such as the weights of lazy modules, could not be trained.
    with torch.inference_mode(mode=False), ExitStack() as copies:
        ref, name, manifest, found = _find(wanted, read, copies, ranks, step)
        _refuse_absent(states, manifest.training_state, ref)
        file_format = find_format(manifest.format)
        stored = Stored(manifest, file_format, found, isinstance(place, Path), wanted.selection, states)
        with whole_parameters(target, writes=True):
            restored = _way_of(manifest).restore(target, stored, ranks, step)
    return LoadedSnapshot(
        iteration=manifest.iteration,
        metric_key=manifest.metric_key,
        value=manifest.value,
        parts=restored.parts,
        path=snapshots_folder(place) / name if isinstance(place, Path) else None,
        keys=restored.keys,
        left_alone=restored.left_alone,
        unused=restored.unused,
        training_state=tuple(states),
        unused_training_state=tuple(name for name in manifest.training_state if name not in states),
    )


def _find(
    wanted: _Wanted, read: set[str], copies: ExitStack, ranks: Ranks, step: str
) -> tuple[str, str, Manifest, FoundSnapshot | None]:
    """Find what is wanted: its ref, name and manifest, and the snapshot on the ranks that read it. **Collective**.

    Args:
        wanted: What is to be loaded.
        read: Set that gets the name of the snapshot, on rank 0, once it is known.
        copies: Stack that removes local copies of a remote run at its end.
        ranks: Ranks that load.
        step: What is being done, in words.
    """
    found: FoundSnapshot | None = None

    def find() -> list[str]:
        nonlocal found
        # Where every rank reads, each brings a copy to its own host, below.
        on_rank_0 = local_copy(
            wanted.place,
            snapshot_of(wanted.ref),
            files=lambda each: () if _way_of(each).is_local else wanted.files(each),
        )
        directory = copies.enter_context(on_rank_0)
        history = read_history(directory)
        ref = only_best(wanted.place, history) if wanted.ref is None else wanted.ref
        read.update(snapshot_of(wanted.ref)(history))
        found = find_ref(directory, history, ref)
        return [ref, found.folder.name, found.manifest.to_bytes().decode()]

    ref, name, text = ranks.broadcast(step, find, remedy=NO_REMEDY, saving=True)
    manifest = Manifest.from_bytes(text.encode())
    if _way_of(manifest).is_local:
        copy = local_copy(wanted.place, lambda _: {name}, files=wanted.files)
        directory = ranks.agree(step, lambda: copies.enter_context(copy), remedy=NO_REMEDY, saving=True)
        found = FoundSnapshot(snapshots_folder(directory) / name, manifest)
    return ref, name, manifest, found


def _check_model(model: object, ref: object) -> nn.Module:
    refuse_mode()
    if isinstance(model, nn.Module) and isinstance(ref, str | None):
        return model
    given = f"load(run, {type(ref).__name__}, {type(model).__name__})"
    raise ConfigError(f"expected load(run, ref, model), or load(run, model=model) for the only best, found {given}")


def _refuse_absent(wanted: Iterable[str], present: Sequence[str], ref: str) -> None:
    if absent := [name for name in wanted if name not in present]:
        raise SnapshotError(
            f"{ref} has no training state {', '.join(map(repr, absent))}; it has: {', '.join(present) or 'none'}. "
            "Give a keeper its training_state, so that it is saved with each best. Nothing was loaded"
        )


def _way_of(manifest: Manifest) -> Way:
    return find_way(find_format(manifest.format).capture)

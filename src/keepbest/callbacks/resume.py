"""Finds the snapshot that a trainer resumes from, and loads it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from keepbest.callbacks.trainer_view import TrainerView
from keepbest.callbacks.training_state import (
    AVERAGE,
    CALLBACKS,
    TRAINER,
    HeldRandomState,
    TrainerProgress,
    optimized_submodels,
    resume_state,
    schedule_state,
    scheduled_submodels,
    trainer_state,
    whole_model,
)
from keepbest.capture.per_rank import PerRank
from keepbest.errors import ConfigError, SnapshotError
from keepbest.load import load_into
from keepbest.ranks import NO_REMEDY, Ranks
from keepbest.run.checkpoints import checkpoint_refs
from keepbest.run.history import History
from keepbest.run.layout import CHECKPOINTS, SNAPSHOTS, ledger_exists
from keepbest.run.names import LATEST
from keepbest.run.reader import find_ref, read_history
from keepbest.user_code import Log

_logger = Log(__name__)

_PLAIN = (bool, int, float, str, list, tuple, Mapping, Tensor, type(None))  # of which the text says the value
_SCHEDULED = ("lr", "momentum", "betas")  # settings of an optimizer that schedules change


class Found(NamedTuple):
    """A snapshot to resume from.

    Attributes:
        directory: Directory of its run.
        ref: Name of a ref on it.
        training_state: Names of the training states that it has.
    """

    directory: Path
    ref: str
    training_state: tuple[str, ...]


class Resumed(NamedTuple):
    """What a trainer resumed from.

    Attributes:
        path: Folder of the snapshot.
        random_state: State of this rank's random number generators for `restore_random_state`; `None` if it was saved
            by another number of ranks.
    """

    path: Path | None
    random_state: dict[str, Any] | None


def find_to_resume(directory: Path, resume: Path | str, ranks: Ranks) -> Found | None:
    """Find the snapshot that `resume` means; `None` if that is "auto" and there is none yet. **Collective**.

    Args:
        directory: Directory of the run.
        resume: Path of a resume checkpoint, which is a ref or a snapshot in the folder of any run; or "auto" for the
            newest complete one of this run.
        ranks: Ranks of the run. Rank 0 looks, and all receive its answer.

    Raises:
        ConfigError: On every rank, if there is no complete checkpoint at the path.
        LedgerError: On every rank, if the ledger is damaged or of another version.
    """

    def find() -> list[Any] | None:
        found = _newest(directory) if resume == "auto" else _at(Path(resume), directory)
        return None if found is None else [str(found.directory), found.ref, list(found.training_state)]

    answer = ranks.broadcast("find the resume checkpoint", find, remedy=NO_REMEDY, saving=True)
    return None if answer is None else Found(Path(answer[0]), answer[1], tuple(answer[2]))


def find_best(directory: Path, ref: str, ranks: Ranks) -> Found:
    """Find the best that `ref` names, and what training state it has. **Collective**.

    Args:
        directory: Directory of the run.
        ref: Name of the best.
        ranks: Ranks of the run. Rank 0 looks, and all receive its answer.

    Raises:
        ConfigError: On every rank, if there is no such best, or training cannot continue from it.
        LedgerError: On every rank, if the ledger is damaged or of another version.
        SnapshotError: On every rank, if the snapshot is missing, or its manifest is damaged.
    """

    def find() -> list[str]:
        if not ledger_exists(directory):
            raise ConfigError(
                f"trainer.resume=best: there is no run in {directory} yet, so it has no best; remove trainer.resume to "
                "start one"
            )
        history = read_history(directory)
        if ref not in history.refs:
            raise ConfigError(
                f"trainer.resume=best: the run in {directory} has no {ref}; trainer.resume=auto takes the latest "
                "resume checkpoint"
            )
        _, manifest = find_ref(directory, history, ref)
        if TRAINER not in manifest.training_state:
            raise ConfigError(
                f"trainer.resume=best: {ref} in {directory} was kept without save_training_state, so training cannot "
                "continue from it; trainer.resume=auto takes the latest resume checkpoint"
            )
        return list(manifest.training_state)

    return Found(
        directory, ref, tuple(ranks.broadcast("find the best to resume from", find, remedy=NO_REMEDY, saving=True))
    )


def load_to_resume(found: Found, trainer: TrainerView, ranks: Ranks) -> Resumed:
    """Load everything that a trainer continues from out of a resume checkpoint. **Collective**.

    A best that was saved with its training state is one too, in which callbacks have no state.

    Args:
        found: Snapshot to load.
        trainer: Trainer whose model, optimizers, counter and callbacks are loaded.
        ranks: Ranks that train together.

    Raises:
        ConfigError: On every rank, if the run had epochs or batches of another size, optimizers of other submodels or
            other schedules, or only one of the two runs averages its weights.
        SnapshotError: On every rank, if a file is damaged, or model or optimizers are not those that were saved.
    """
    _check_average(trainer, had_average=AVERAGE in found.training_state)
    _check_schedules(trainer, found.training_state)
    _check_optimizers(trainer, found.training_state)
    wanted = resume_state(trainer, ranks) if CALLBACKS in found.training_state else trainer_state(trainer, ranks)
    progress, random = TrainerProgress(trainer.update_counter, ranks.world_size), HeldRandomState()
    states = {**wanted, TRAINER: progress, "random": PerRank(random)}
    step = f"resume from {found.ref} of {found.directory}"
    in_config = _settings(trainer)
    loaded = load_into(whole_model(trainer), found.directory, found.ref, ranks=ranks, step=step, training_state=states)
    ranks.agree(step, lambda: _warn_of_changes(in_config, _settings(trainer)) if ranks.is_main else None)
    return Resumed(loaded.path, random.held if progress.is_of_as_many_ranks else None)


def _newest(directory: Path) -> Found | None:
    if not ledger_exists(directory):
        return None
    try:
        history = read_history(directory)
    except SnapshotError:  # a process was killed before the first line: there is nothing yet
        return None
    # Where somebody has removed the latest, an earlier one of its timeline will do.
    earlier = [ref for ref in checkpoint_refs(history) if ref not in history.abandoned]
    for ref in [*({LATEST} & history.refs.keys()), *reversed(earlier)]:
        if (found := _complete(directory, history, ref)) is not None:
            return found
        _logger.warning("%s: the snapshot of %s is not complete, so it is not resumed from", directory, ref)
    return None


def _at(path: Path, directory: Path) -> Found:
    """What is at a path that a user gave. Of links only one to a run is followed, and refs by the ledger."""
    run, known = directory, ""
    found: Found | None = None
    for place in (path, path.resolve()):
        folder = place.parent.parent if place.parent.name == SNAPSHOTS else place.parent
        if folder.name == CHECKPOINTS and ledger_exists(folder.parent):
            run, history = folder.parent, read_history(folder.parent)
            names = [place.name] if place.parent == folder else _refs_on(history, place.name)
            found = next((each for ref in names if (each := _complete(run, history, ref)) is not None), None)
            break
    if found is None:
        if ledger_exists(run):
            known = ", ".join(checkpoint_refs(read_history(run)))
        there = f"{known}; trainer.resume=auto takes the latest" if known else "none"
        raise ConfigError(f"no complete resume checkpoint at {path}; in {run / CHECKPOINTS} there are: {there}")
    return found


def _refs_on(history: History, snapshot: str) -> list[str]:
    return [ref for ref, each in history.refs.items() if each == snapshot]


def _complete(directory: Path, history: History, ref: str) -> Found | None:
    """What `ref` names, if training can continue from it and no file of it is missing or cut."""
    if ref not in history.refs:
        return None
    try:
        folder, manifest = find_ref(directory, history, ref)
        sizes = {name: (folder / name).lstat().st_size for name in manifest.files}
    except (SnapshotError, OSError):  # a warning, or the error, names it
        return None
    is_whole = all(record.digest.bytes == sizes[name] for name, record in manifest.files.items())
    return Found(directory, ref, manifest.training_state) if is_whole and TRAINER in manifest.training_state else None


def _check_average(trainer: TrainerView, *, had_average: bool) -> None:
    if had_average != (trainer.average is not None):
        had, has = ("an ", "no ") if had_average else ("no ", "an ")
        raise ConfigError(
            f"the run to resume kept {had}average of its weights, this one keeps {has}average: its bests would not be "
            f"comparable; {'set' if had_average else 'remove'} trainer.ema_decay, or start a new run"
        )


def _check_schedules(trainer: TrainerView, saved: Sequence[str]) -> None:
    had, has = (sorted(scheduled_submodels(names)) for names in (saved, trainer.training_state))
    if had != has:
        raise ConfigError(
            f"the run to resume had {_schedules_of(had)}, this one has {_schedules_of(has)}: the learning rate would "
            "be that of neither; set schedule as it was, or start a new run"
        )


def _schedules_of(submodels: Sequence[str]) -> str:
    return f"a schedule of {', '.join(submodels)}" if submodels else "no schedule"


def _check_optimizers(trainer: TrainerView, saved: Sequence[str]) -> None:
    had, has = sorted(optimized_submodels(saved)), sorted(trainer.optimizers)
    if had != has:
        raise ConfigError(
            f"the run to resume trained {', '.join(had)}, this one trains {', '.join(has)}: optimizers continue "
            "for what they trained alone; train the same submodels, or start a new run"
        )


def _settings(trainer: TrainerView) -> dict[str, str]:
    """The settings of optimizers and schedules in words, without what a schedule changes."""
    found: dict[str, Any] = {}
    scheduled = scheduled_submodels(trainer.training_state)
    for submodel, optimizer in trainer.optimizers.items():
        groups = optimizer.param_groups
        for number, group in enumerate(groups):
            place = f"the optimizer of {submodel}" + (f", group {number}" if len(groups) > 1 else "")
            left_out = {"params", *(_SCHEDULED if submodel in scheduled else ())}
            found |= {f"{name} of {place}": value for name, value in group.items() if name not in left_out}
    for submodel in scheduled:
        schedule = trainer.training_state[schedule_state(submodel)]
        names = inspect.signature(type(schedule)).parameters.keys() & vars(schedule).keys() - {
            "optimizer",
            "last_epoch",
        }
        found |= {f"{name} of the schedule of {submodel}": vars(schedule)[name] for name in sorted(names)}
    return {name: repr(value) for name, value in found.items() if isinstance(value, _PLAIN)}


def _warn_of_changes(in_config: Mapping[str, str], saved: Mapping[str, str]) -> None:
    changes = [
        f"{name} is {saved[name]} and not {value}"
        for name, value in in_config.items()
        if name in saved and saved[name] != value
    ]
    if changes:
        _logger.warning(
            "the run continues with settings that were saved, and not with those of its config by now: %s",
            "; ".join(changes),
        )

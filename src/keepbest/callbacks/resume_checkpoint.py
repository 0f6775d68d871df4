"""Resume checkpoints: everything that a run needs to continue as if it had never stopped, on any number of ranks.

<run>/resume/E7_U140_S8960/      model, average and optimizers in torch's distributed format, a share from each rank
              trainer.pt         update counter, states of the callbacks
              rng_0.pt ...       random number generators of each rank
<run>/resume/latest              -> E7_U140_S8960
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from keepbest.callbacks.resume_folder import INDEX_FILE, STATE_FILE, ResumeFolder
from keepbest.callbacks.trainer_view import TrainerView
from keepbest.capture.refusals import is_plain_data
from keepbest.capture.torch_errors import one_error
from keepbest.errors import ConfigError, RankFailedError, SnapshotError
from keepbest.formats.index import read_index
from keepbest.formats.plain_load import check_sizes, load_plain, load_plain_bytes
from keepbest.formats.torch_reader import PlainPlanner, PlainReader
from keepbest.modules.wrappers import PlainNames
from keepbest.random_state import read_random_state
from keepbest.ranks import Ranks

# Flat keys: with lists of parameter groups FSDP1 cannot load on a rank that holds no part of a parameter.
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
_MODEL, _OPTIMIZERS, _AVERAGE = "model", "optimizers", "average"


def write_resume_checkpoint(folder: ResumeFolder, name: str, trainer: TrainerView, ranks: Ranks) -> None:
    """Write everything that a resumed run needs, without publishing it. **Collective**.

    Args:
        folder: Folder of the run's resume checkpoints.
        name: Name of the checkpoint.
        trainer: Trainer whose state is saved.
        ranks: Ranks that train together.

    Raises:
        ConfigError: On every rank, if a setting of an optimizer is no plain data.
        RankFailedError: On every rank, if a rank cannot write its share.
        StorageError: On every rank, if the file system refuses.
    """
    step = f"write the resume checkpoint {name}"
    ranks.agree(step, lambda: folder.begin(name) if ranks.is_main else None, saving=True)
    with one_error(step, ranks, RankFailedError):
        model, optimizers = get_state_dict(trainer.model, list(trainer.optimizers.values()), options=_OPTIONS)
    # Where a resume would refuse a value, the checkpoint is refused.
    ranks.agree(step, lambda: _check_plain(optimizers))
    with one_error(step, ranks, RankFailedError):
        state = {_MODEL: model, _OPTIMIZERS: optimizers, **_weights_of_average(trainer)}
        save(state, storage_writer=_DurableWriter(folder, name), no_dist=ranks.world_size == 1)
    ranks.agree(step, lambda: _write_states(folder, name, trainer, ranks), saving=True)


def find_resume_checkpoint(directory: Path, resume: Path | str, ranks: Ranks) -> Path | None:
    """Find the resume checkpoint that `resume` means; `None` if that is "auto" and there is none yet. **Collective**.

    Args:
        directory: Directory of the run.
        resume: Path of a checkpoint (or a link to one), or "auto" for the newest complete one.
        ranks: Ranks of the run. Rank 0 looks, and all receive its answer.

    Raises:
        ConfigError: If there is no complete checkpoint at the path.
    """

    def find() -> str | None:
        found = ResumeFolder(directory).find(resume)
        return None if found is None else str(found)

    path = ranks.broadcast("find the resume checkpoint", find, saving=True)
    return None if path is None else Path(path)


class _DurableWriter(FileSystemWriter):
    """Writes a share as torch does, and syncs each file when it is whole: torch syncs some before it flushes them."""

    def __init__(self, folder: ResumeFolder, name: str) -> None:
        super().__init__(folder.temporary(name), sync_files=False)
        self._folder = folder
        self._name = name

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        written = super().write_data(plan, planner)
        for file in sorted({result.storage_data.relative_path for result in written.wait()}):
            self._folder.sync(self._name, file)
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        self._folder.sync(self._name, INDEX_FILE)


class _Saved(NamedTuple):
    """The parts of a checkpoint that a rank reads by itself."""

    state: dict[str, Any]
    random_state: dict[str, Any] | None
    keys: frozenset[str]


def load_resume_checkpoint(path: Path, trainer: TrainerView, ranks: Ranks) -> dict[str, Any] | None:
    """Load model, optimizers, update counter and callbacks from a complete checkpoint. **Collective**.

    Args:
        path: Path of the checkpoint.
        trainer: Trainer whose model, optimizers, counter and callbacks are loaded.
        ranks: Ranks that train together.

    Returns:
        The state of this rank's random number generators for `restore_random_state`; `None` if the checkpoint was saved
        by another number of ranks.

    Raises:
        ConfigError: If the run had epochs or batches of another size, or only one of the two runs averages its weights.
        SnapshotError: If model or optimizers are not those that were saved.
    """
    step = f"resume from {path}"
    remedy = "Every rank must be able to read this folder"
    saved = ranks.agree(step, lambda: _read(path, ranks), remedy=remedy, saving=True)
    ranks.agree(step, lambda: trainer.update_counter.load_state_dict(saved.state["update_counter"]))
    ranks.agree(step, lambda: _load_average(saved.state.get("average"), trainer))
    with one_error(step, ranks, SnapshotError):
        _load_weights(path, ranks, trainer, saved.keys)
    states = saved.state["callbacks"]

    def load_callbacks() -> None:
        for callback in trainer.callbacks:
            if callback.state_key in states:
                callback.load_state_dict(states[callback.state_key])

    ranks.agree(step, load_callbacks)
    return saved.random_state


def _write_states(folder: ResumeFolder, name: str, trainer: TrainerView, ranks: Ranks) -> None:
    folder.write(name, f"rng_{ranks.rank}.pt", _serialized(read_random_state()))
    if ranks.is_main:
        state = {
            "world_size": ranks.world_size,
            "update_counter": trainer.update_counter.state_dict(),
            "average": None if trainer.average is None else trainer.average.state_dict(),
            "callbacks": {callback.state_key: callback.state_dict() for callback in trainer.callbacks},
        }
        folder.write(name, STATE_FILE, _serialized(state))


def _read(path: Path, ranks: Ranks) -> _Saved:
    state: dict[str, Any] = _read_state(path / STATE_FILE)
    random_state = None
    if state["world_size"] == ranks.world_size:
        random_state = _read_state(path / f"rng_{ranks.rank}.pt")
    return _Saved(state, random_state, frozenset(read_index(path).state_dict_metadata))


def _read_state(path: Path) -> dict[str, Any]:
    state = load_plain(path)
    if not isinstance(state, dict):
        raise SnapshotError(f"{path} holds a {type(state).__name__}, not the state of a run")
    check_sizes(path, state)
    return state


def _load_average(state: dict[str, int] | None, trainer: TrainerView) -> None:
    if (state is None) != (trainer.average is None):
        had, has = ("no ", "an ") if state is None else ("an ", "no ")
        raise ConfigError(
            f"the run to resume kept {had}average of its weights, this one keeps {has}average: its bests would not be "
            f"comparable; {'remove' if state is None else 'set'} trainer.ema_decay, or start a new run"
        )
    if state is not None and trainer.average is not None:
        trainer.average.load_state_dict(state)


def _weights_of_average(trainer: TrainerView) -> dict[str, Any]:
    return {} if trainer.average is None else {_AVERAGE: get_model_state_dict(trainer.average.model, options=_OPTIONS)}


def _load_weights(path: Path, ranks: Ranks, trainer: TrainerView, saved_keys: frozenset[str]) -> None:
    optimizers = list(trainer.optimizers.values())
    model: dict[str, Any]
    states: dict[str, Any]
    model, states = get_state_dict(trainer.model, optimizers, options=_OPTIONS)
    # A parameter that never had a gradient has no optimizer state yet. Reading the states has just made one for it.
    prefix = f"{_OPTIMIZERS}.state."
    stateful = {key.removeprefix(prefix).rpartition(".")[0] for key in saved_keys if key.startswith(prefix)}
    stored = {
        key: value
        for key, value in states.items()
        if not key.startswith("state.") or key.removeprefix("state.").rpartition(".")[0] in stateful
    }
    loaded: dict[str, Any] = {_MODEL: model, _OPTIMIZERS: stored, **_weights_of_average(trainer)}
    load(loaded, storage_reader=PlainReader(path), planner=PlainPlanner(), no_dist=ranks.world_size == 1)
    set_state_dict(
        trainer.model,
        optimizers,
        model_state_dict=loaded[_MODEL],
        optim_state_dict={**states, **loaded[_OPTIMIZERS]},
        options=_OPTIONS,
    )
    if trainer.average is not None:
        set_model_state_dict(trainer.average.model, loaded[_AVERAGE], options=_OPTIONS)
    names = PlainNames(trainer.model)
    for name, parameter in trainer.model.named_parameters():
        if names.plain(name) not in stateful:
            for optimizer in optimizers:
                optimizer.state.pop(parameter, None)


def _check_plain(optimizers: Mapping[str, Any]) -> None:
    for key, value in optimizers.items():
        if not isinstance(value, torch.Tensor) and not is_plain_data(value):
            raise ConfigError(
                f"{key} of an optimizer is a {type(value).__name__}, which a resume would not read; pass a number"
            )


def _serialized(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    # A state that only unpickling of arbitrary objects could read back is refused now, not when the run has to resume.
    load_plain_bytes(buffer.getvalue())
    return buffer.getvalue()

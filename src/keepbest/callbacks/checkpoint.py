"""Resume checkpoints: everything that a run needs to continue as if it had never stopped, on any number of ranks.

<run>/resume/E7_U140_S8960/      model, average and optimizers in torch's distributed format, a share from each rank
              trainer.pt         update counter, states of the callbacks
              rng_0.pt ...       random number generators of each rank
<run>/resume/latest              -> E7_U140_S8960
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from keepbest.callbacks.config import CallBackBaseConfig
from keepbest.callbacks.periodic import PeriodicCallback
from keepbest.callbacks.resume_folder import STATE_FILE, ResumeFolder
from keepbest.callbacks.trainer_view import TrainerView
from keepbest.errors import ConfigError, RankFailedError, SnapshotError
from keepbest.formats.dcp import one_error
from keepbest.interval import IntervalType
from keepbest.modules.wrappers import plain_key
from keepbest.random_state import read_random_state
from keepbest.ranks import Ranks

if TYPE_CHECKING:
    from keepbest.training.counter import UpdateCounter

# Flat keys: with lists of parameter groups FSDP1 cannot load on a rank that holds no part of a parameter.
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
_MODEL, _OPTIMIZERS, _AVERAGE = "model", "optimizers", "average"


class CheckpointCallbackConfig(CallBackBaseConfig):
    """Config of `CheckpointCallback`.

    Attributes:
        keep_last: Number of resume checkpoints to keep; `None` keeps all.
    """

    name: Literal["CheckpointCallback"] = "CheckpointCallback"

    keep_last: Annotated[int, Field(gt=0, strict=True)] | None = 1


class CheckpointCallback(PeriodicCallback):
    """Saves resume checkpoints, after everything else that happens at the same iteration.

    Checkpoints of later iterations belong to an abandoned timeline. They are removed like old ones.
    """

    config_class: ClassVar[type[CheckpointCallbackConfig]] = CheckpointCallbackConfig
    runs_last: ClassVar[bool] = True

    def __init__(self, callback_config: CheckpointCallbackConfig, **kwargs: Any) -> None:
        super().__init__(callback_config, **kwargs)
        self._keep_last = callback_config.keep_last
        self._folder = ResumeFolder(self.directory)
        self._newest: str | None = None

    @property
    def state_key(self) -> str:
        """One name for all: two of them in one run would remove each other's checkpoints, so they are refused."""
        return type(self).__name__

    def periodic_callback(self, *, interval_type: IntervalType, update_counter: UpdateCounter, **_kwargs: Any) -> None:
        """Save a resume checkpoint. **Collective**. Nothing in evaluation.

        Raises:
            RankFailedError: On every rank, if a rank cannot write its share.
            StorageError: On every rank, if the file system refuses.
        """
        if interval_type == "eval":
            return
        self._save(str(update_counter.iteration))

    def before_preemption(self, *, update_counter: UpdateCounter, **_kwargs: Any) -> None:
        """Save a resume checkpoint now, unless there is one of this iteration. **Collective**."""
        if self._newest != (name := str(update_counter.iteration)):
            self._save(name)

    def _save(self, name: str) -> None:
        for callback in self.trainer.callbacks:
            callback.before_checkpoint(name=name)
        self._write(name)
        removed = self.ranks.broadcast(
            f"publish the resume checkpoint {name}",
            lambda: self._folder.publish(name, keep_last=self._keep_last),
            remedy=f"Check that {self._folder.path} can be written",
            saving=True,
        )
        for old in removed:
            for callback in self.trainer.callbacks:
                callback.after_checkpoint_removed(name=old)
        self._newest = name

    def _write(self, name: str) -> None:
        step = f"write the resume checkpoint {name}"
        self.ranks.agree(step, lambda: self._folder.begin(name) if self.ranks.is_main else None)
        with one_error(step, self.ranks, RankFailedError):
            trainer = self.trainer
            model, optimizers = get_state_dict(trainer.model, list(trainer.optimizers.values()), options=_OPTIONS)
            state = {_MODEL: model, _OPTIMIZERS: optimizers, **_weights_of_average(trainer)}
            save(state, checkpoint_id=self._folder.temporary(name), no_dist=self.ranks.world_size == 1)
        self.ranks.agree(step, lambda: self._write_states(name), saving=True)

    def _write_states(self, name: str) -> None:
        self._folder.write(name, f"rng_{self.ranks.rank}.pt", _serialized(read_random_state()))
        if self.ranks.is_main:
            trainer = self.trainer
            state = {
                "world_size": self.ranks.world_size,
                "update_counter": trainer.update_counter.state_dict(),
                "average": None if trainer.average is None else trainer.average.state_dict(),
                "callbacks": {callback.state_key: callback.state_dict() for callback in trainer.callbacks},
            }
            self._folder.write(name, STATE_FILE, _serialized(state))


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

    path = ranks.broadcast("find the resume checkpoint", find)
    return None if path is None else Path(path)


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
    saved = ranks.agree(step, lambda: _read(path, ranks), remedy="Every rank must be able to read this folder")
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


def _read(path: Path, ranks: Ranks) -> _Saved:
    state: dict[str, Any] = torch.load(path / STATE_FILE, weights_only=True)
    random_state = None
    if state["world_size"] == ranks.world_size:
        random_state = torch.load(path / f"rng_{ranks.rank}.pt", weights_only=True)
    return _Saved(state, random_state, frozenset(FileSystemReader(path).read_metadata().state_dict_metadata))


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
    load(loaded, checkpoint_id=path, no_dist=ranks.world_size == 1)
    set_state_dict(
        trainer.model,
        optimizers,
        model_state_dict=loaded[_MODEL],
        optim_state_dict={**states, **loaded[_OPTIMIZERS]},
        options=_OPTIONS,
    )
    if trainer.average is not None:
        set_model_state_dict(trainer.average.model, loaded[_AVERAGE], options=_OPTIONS)
    for name, parameter in trainer.model.named_parameters():
        if plain_key(trainer.model, name) not in stateful:
            for optimizer in optimizers:
                optimizer.state.pop(parameter, None)


def _serialized(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    # A state that only unpickling of arbitrary objects could read back is refused now, not when the run has to resume.
    torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    return buffer.getvalue()

"""Resume checkpoints: everything that a run needs to go on as if it had never stopped, on any number of ranks.

    <run>/resume/E7_U140_S8960/      model and optimizers in torch's distributed format, each rank with its share
                  trainer.pt         update counter, states of the callbacks
                  rng_0.pt ...       random number generators of each rank
    <run>/resume/latest              -> E7_U140_S8960

A checkpoint is written under a name that ends in `.tmp` and renamed once it is complete; then older ones are removed.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from keepbest.callbacks.config import CallBackBaseConfig
from keepbest.callbacks.periodic import PeriodicCallback
from keepbest.errors import ConfigError, IterationError, RankFailedError, SnapshotError
from keepbest.interval import IntervalType
from keepbest.iteration import TrainingIteration
from keepbest.random_state import read_random_state
from keepbest.ranks import Ranks
from keepbest.store.files import Files

if TYPE_CHECKING:
    from keepbest.training.counter import UpdateCounter
    from keepbest.training.trainer import Trainer

_LATEST = "latest"
_TEMPORARY = ".tmp"
# Flat keys: with lists of parameter groups FSDP1 cannot load on a rank that holds no part of a parameter.
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


class CheckpointCallbackConfig(CallBackBaseConfig):
    """Config of `CheckpointCallback`.

    Attributes:
        keep_last: how many resume checkpoints are kept; `None` keeps all.
    """

    name: Literal["CheckpointCallback"] = "CheckpointCallback"

    keep_last: Annotated[int, Field(gt=0, strict=True)] | None = 1


class CheckpointCallback(PeriodicCallback):
    """Saves resume checkpoints, after everything else that happens at the same iteration.

    Checkpoints of later iterations are those of a timeline that a resume has left; they are removed like old ones.

    Raises:
        ConfigError: before training, if the run has another `CheckpointCallback`: they would remove each other's.
    """

    config_class: ClassVar[type[CheckpointCallbackConfig]] = CheckpointCallbackConfig
    runs_last: ClassVar[bool] = True

    def __init__(self, callback_config: CheckpointCallbackConfig, **kwargs: Any) -> None:
        super().__init__(callback_config, **kwargs)
        self._keep_last = callback_config.keep_last
        self._folder = self.directory / "resume"
        self._files = Files()

    def before_training(self, *, update_counter: UpdateCounter, **kwargs: Any) -> None:
        del update_counter, kwargs
        if sum(isinstance(callback, CheckpointCallback) for callback in self.trainer.callbacks) > 1:
            raise ConfigError("a run can have only one CheckpointCallback; remove the others from its callbacks")

    def periodic_callback(self, *, interval_type: IntervalType, update_counter: UpdateCounter, **_kwargs: Any) -> None:
        if interval_type == "eval":
            return
        name = str(update_counter.iteration)
        # The snapshots that this state names must outlive it: they are pinned until the checkpoint is removed.
        keepers = [callback for callback in self.trainer.callbacks if hasattr(callback, "flush_keeper")]
        for keeper in keepers:
            keeper.flush_keeper(pin=name)
        self._write(name)
        removed = self.ranks.broadcast(
            f"publish the resume checkpoint {name}",
            lambda: self._publish(name),
            remedy=f"see whether {self._folder} can be written",
            saving=True,
        )
        for tag in removed:
            for keeper in keepers:
                keeper.release_pin(tag)

    def _write(self, name: str) -> None:
        temporary = self._folder / (name + _TEMPORARY)
        step = f"write the resume checkpoint {name}"
        self.ranks.agree(step, lambda: self._make_empty(temporary) if self.ranks.is_main else None)
        with _collective(step, RankFailedError):
            model, optimizers = get_state_dict(self.model, list(self.trainer.optimizers.values()), options=_OPTIONS)
            state = {"model": model, "optimizers": optimizers}
            save(state, checkpoint_id=temporary, no_dist=self.ranks.world_size == 1)
        self.ranks.agree(step, lambda: self._write_states(temporary), saving=True)

    def _make_empty(self, folder: Path) -> None:
        self._files.remove(folder)
        self._files.make_folder(folder)

    def _write_states(self, folder: Path) -> None:
        self._write_file(folder / f"rng_{self.ranks.rank}.pt", read_random_state())
        if self.ranks.is_main:
            trainer: Trainer = self.trainer
            state = {
                "world_size": self.ranks.world_size,
                "update_counter": trainer.update_counter.state_dict(),
                "callbacks": {callback.state_key: callback.state_dict() for callback in trainer.callbacks},
            }
            self._write_file(folder / "trainer.pt", state)

    def _write_file(self, path: Path, state: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        # A state that only unpickling arbitrary objects could read back would be found out when it is needed.
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
        with self._files.create(path) as file:
            file.write(buffer.getvalue())
            file.sync()

    def _publish(self, name: str) -> list[str]:
        """Make the complete checkpoint visible, remove what it replaces, and tell the names of what was removed."""
        final, temporary = self._folder / name, self._folder / (name + _TEMPORARY)
        self._files.sync_folder(temporary)
        if final.exists():  # of a timeline that a resume has left
            self._files.rename(final, self._folder / f"{name}.replaced{_TEMPORARY}")
        self._files.rename(temporary, final)
        self._files.sync_folder(self._folder)
        link = self._folder / (_LATEST + _TEMPORARY)
        self._files.remove(link)
        self._files.link(name, link)
        self._files.rename(link, self._folder / _LATEST)
        self._files.sync_folder(self._folder)
        for leftover in self._folder.glob(f"*{_TEMPORARY}"):
            self._files.remove(leftover)
        outdated = self._outdated(name)
        for old in outdated:
            self._files.remove(self._folder / old)
        return outdated

    def _outdated(self, name: str) -> list[str]:
        newest = TrainingIteration.parse(name)
        past = [path.name for path in _complete_checkpoints(self._folder) if not _iteration(path).follows(newest)]
        kept = past if self._keep_last is None else past[-self._keep_last :]
        return [path.name for path in _complete_checkpoints(self._folder) if path.name not in kept]


def find_resume_checkpoint(directory: Path, resume: Path | str, ranks: Ranks) -> Path | None:
    """The resume checkpoint that `resume` means, or `None` if that is "auto" and there is none yet. **Collective**.

    Args:
        directory: folder of the run.
        resume: path of a checkpoint (or a link to one), or "auto": the one saved last that is complete.
        ranks: rank 0 looks, all get its answer.

    Raises:
        ConfigError: if there is no complete checkpoint at the path.
    """

    def find() -> str | None:
        latest = directory / "resume" / _LATEST
        complete = _complete_checkpoints(directory / "resume")
        if resume == "auto":
            best = latest if _is_complete(latest) else next(reversed(complete), None)
            return None if best is None else str(best.resolve())
        if not _is_complete(Path(resume)):
            there = ", ".join(path.name for path in complete) or "none"
            raise ConfigError(
                f"no complete resume checkpoint at {resume}; in {directory / 'resume'} there are: {there}"
            )
        return str(Path(resume).resolve())

    found = ranks.broadcast("find the resume checkpoint", find)
    return None if found is None else Path(found)


def load_resume_checkpoint(path: Path, trainer: Trainer) -> dict[str, Any] | None:
    """Load model, optimizers, update counter and callbacks from a complete checkpoint. **Collective**.

    Returns:
        The state of this rank's random number generators for `restore_random_state`, or `None` if the checkpoint was
        saved by another number of ranks.

    Raises:
        ConfigError: if the run had epochs or batches of another size.
        SnapshotError: if model or optimizers are not those that were saved.
    """
    ranks = trainer.ranks
    step = f"resume from {path}"

    def read() -> tuple[dict[str, Any], dict[str, Any] | None]:
        state: dict[str, Any] = torch.load(path / "trainer.pt", weights_only=True)
        if state["world_size"] != ranks.world_size:
            return state, None
        return state, torch.load(path / f"rng_{ranks.rank}.pt", weights_only=True)

    state, random_state = ranks.agree(step, read, remedy="every rank must be able to read this folder")
    ranks.agree(step, lambda: trainer.update_counter.load_state_dict(state["update_counter"]))
    optimizers = list(trainer.optimizers.values())
    with _collective(step, SnapshotError):
        model_state, optimizer_state = get_state_dict(trainer.model, optimizers, options=_OPTIONS)
        loaded: dict[str, Any] = {"model": model_state, "optimizers": optimizer_state}
        load(loaded, checkpoint_id=path, no_dist=ranks.world_size == 1)
        set_state_dict(
            trainer.model,
            optimizers,
            model_state_dict=loaded["model"],
            optim_state_dict=loaded["optimizers"],
            options=_OPTIONS,
        )

    def load_callbacks() -> None:
        for callback in trainer.callbacks:
            if callback.state_key in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][callback.state_key])

    ranks.agree(step, load_callbacks)
    return random_state


@contextmanager
def _collective(step: str, error_class: type[RankFailedError | SnapshotError]) -> Iterator[None]:
    """Turns what torch raises on every rank, which is not even an `Exception`, into an error of ours."""
    try:
        with warnings.catch_warnings():
            # It is meant to be alone where there is one rank.
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    except CheckpointException as error:
        causes = "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in sorted(error.failures.items()))
        raise error_class(f"could not {step}: {causes}") from error


def _complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest iteration first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _is_checkpoint_name(path.name) and _is_complete(path)]
    return sorted(found, key=lambda path: _iteration(path).update or 0)


def _is_complete(path: Path) -> bool:
    return not path.name.endswith(_TEMPORARY) and (path / "trainer.pt").is_file() and (path / ".metadata").is_file()


def _is_checkpoint_name(name: str) -> bool:
    try:
        TrainingIteration.parse(name)
    except IterationError:
        return False
    return True


def _iteration(path: Path) -> TrainingIteration:
    return TrainingIteration.parse(path.name)

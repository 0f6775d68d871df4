"""What the trainer needs to continue: optimizers, its place in the data, random numbers, and states of callbacks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from keepbest.callbacks.trainer_view import TrainerView
from keepbest.capture.per_rank import PerRank
from keepbest.random_state import read_random_state
from keepbest.ranks import Ranks

if TYPE_CHECKING:
    from keepbest.training.counter import UpdateCounter

TRAINER, CALLBACKS, AVERAGE = "trainer", "callbacks", "average"
_OPTIMIZER, _SCHEDULE = "optimizer.", "schedule."


class TrainerProgress:
    """How far a trainer is: a training state. The order of the samples follows from it.

    Args:
        counter: Counter of the trainer.
        world_size: Number of ranks that train.

    Attributes:
        is_of_as_many_ranks: Whether what was loaded was saved by as many ranks.
    """

    def __init__(self, counter: UpdateCounter, world_size: int) -> None:
        self._counter, self._world_size = counter, world_size
        self.is_of_as_many_ranks = False

    def state_dict(self) -> dict[str, Any]:
        return {"update_counter": self._counter.state_dict(), "world_size": self._world_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._counter.load_state_dict(state_dict["update_counter"])
        self.is_of_as_many_ranks = state_dict["world_size"] == self._world_size


class HeldRandomState:
    """The random states of a rank: they are read when they are saved, and held when they are loaded.

    The trainer sets them right before its first update.

    Attributes:
        held: What was loaded; `None` if nothing was.
    """

    def __init__(self) -> None:
        self.held: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return read_random_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.held = state_dict


class CallbackStates:
    """The states of all callbacks of a trainer: a training state.

    Args:
        trainer: Trainer, whose callbacks may be made later.
    """

    def __init__(self, trainer: TrainerView) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        return {callback.state_key: callback.state_dict() for callback in self._trainer.callbacks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for callback in self._trainer.callbacks:
            if callback.state_key in state_dict:
                callback.load_state_dict(state_dict[callback.state_key])


def trainer_state(trainer: TrainerView, ranks: Ranks) -> dict[str, Any]:
    """The training states of a trainer that a best has, by name. **Rank-local**."""
    return {
        **{f"{_OPTIMIZER}{name}": optimizer for name, optimizer in trainer.optimizers.items()},
        **trainer.training_state,
        TRAINER: TrainerProgress(trainer.update_counter, ranks.world_size),
        "random": PerRank(HeldRandomState()),
    }


def resume_state(trainer: TrainerView, ranks: Ranks) -> dict[str, Any]:
    """The training states of a trainer that a resume checkpoint has, by name. **Rank-local**."""
    average = {} if trainer.average is None else {AVERAGE: trainer.average}
    return {**trainer_state(trainer, ranks), CALLBACKS: CallbackStates(trainer), **average}


def whole_model(trainer: TrainerView) -> nn.Module:
    """All weights that a trainer continues from: its model, or that and the average beside it. **Rank-local**."""
    if trainer.average is None:
        return trainer.model
    return nn.ModuleDict({"model": trainer.model, AVERAGE: trainer.average.model})


def schedule_state(submodel: str) -> str:
    """Name of the training state that is the schedule of a submodel."""
    return f"{_SCHEDULE}{submodel}"


def scheduled_submodels(states: Iterable[str]) -> list[str]:
    """The submodels whose schedules are among these training states."""
    return [state.removeprefix(_SCHEDULE) for state in states if state.startswith(_SCHEDULE)]


def optimized_submodels(states: Iterable[str]) -> list[str]:
    """The submodels whose optimizers are among these training states."""
    return [state.removeprefix(_OPTIMIZER) for state in states if state.startswith(_OPTIMIZER)]

"""What the trainer needs to continue from a best: optimizers, its place in the data, and random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from keepbest.callbacks.trainer_view import TrainerView
from keepbest.capture.per_rank import PerRank
from keepbest.load import load_into
from keepbest.random_state import read_random_state
from keepbest.ranks import Ranks

if TYPE_CHECKING:
    from keepbest.training.counter import UpdateCounter


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


def trainer_state(trainer: TrainerView, ranks: Ranks) -> dict[str, Any]:
    """The training states of a trainer, by name. **Rank-local**."""
    return {
        **{f"optimizer.{name}": optimizer for name, optimizer in trainer.optimizers.items()},
        "trainer": TrainerProgress(trainer.update_counter, ranks.world_size),
        "random": PerRank(HeldRandomState()),
    }


def load_best(directory: Path, ref: str, trainer: TrainerView, ranks: Ranks) -> dict[str, Any] | None:
    """Load model, optimizers and update counter of the best that `ref` names. **Collective**.

    Args:
        directory: Directory of the run.
        ref: Name of the ref.
        trainer: Trainer that continues from it.
        ranks: Ranks that train together.

    Returns:
        The state of this rank's random number generators for `restore_random_state`; `None` if the best was saved by
        another number of ranks.

    Raises:
        SnapshotError: On every rank, if there is none, it has no training state, or it does not fit.
        ConfigError: On every rank, if the run had epochs or batches of another size.
    """
    progress, random = TrainerProgress(trainer.update_counter, ranks.world_size), HeldRandomState()
    states = {**trainer_state(trainer, ranks), "trainer": progress, "random": PerRank(random)}
    load_into(trainer.model, directory, ref, ranks=ranks, step=f"resume from {ref}", training_state=states)
    return random.held if progress.is_of_as_many_ranks else None

"""A training state that differs from rank to rank. **Rank-local**."""

from __future__ import annotations

from typing import Any

_RANK = "rank="


class PerRank:
    """Marks a training state of which each rank has its own, such as the place in its share of the data.

    `BestKeeper(..., training_state={"loader": PerRank(loader)})` keeps the state of every rank. To load, wrap the
    object likewise. A rank that did not exist when it was saved keeps its own, with a warning.

    Args:
        state: Object with `state_dict` and `load_state_dict`.
    """

    def __init__(self, state: Any) -> None:
        self._state = state

    def state_dict(self) -> Any:
        """The state of this rank. **Rank-local**."""
        return self._state.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        """Continue from what `state_dict` returned. **Rank-local**."""
        self._state.load_state_dict(state_dict)


def key_of_rank(rank: int) -> str:
    """Key of the entry of a rank."""
    return f"{_RANK}{rank}"


def is_of_a_rank(entry: str) -> bool:
    """Whether an entry is that of a rank."""
    return entry.startswith(_RANK)

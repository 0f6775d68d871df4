"""What a capture asks for, and what it gives: the share of a snapshot that each rank writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from keepbest.formats.format import Receipt
from keepbest.modules.parts import Part
from keepbest.modules.sources import StateDict
from keepbest.modules.state_dicts import Version
from keepbest.staging.slot import Slot, Staging


@dataclass(frozen=True, slots=True)
class Items:
    """What is to be saved.

    Attributes:
        model: Model, plain or wrapped.
        parts: Parts of it.
        save_frozen_weights: Whether parameters that do not require grad are among the weights.
        training_state: What is kept beside the weights, by its name: objects with `state_dict` and `load_state_dict`.
    """

    model: nn.Module
    parts: tuple[Part, ...]
    save_frozen_weights: bool
    training_state: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of the parts of the snapshot: those of the model, then the training states."""
        return [*(part.name for part in self.parts), *self.training_state]


class Writers(Protocol):
    """How the ranks that write a snapshot come together. **Collective** where several ranks write now."""

    def __call__(self, begin: Callable[[], str], write: Callable[[str], Receipt]) -> Receipts | None:
        """Let every writer write its share, now or when the function that is returned is called.

        Args:
            begin: Function by which rank 0 makes the folder of the snapshot; returns the name of the snapshot.
            write: Function that writes the share of this rank of the snapshot of that name.

        Returns:
            Function that writes what is left to write; on rank 0 it returns the receipts of the writers, by rank.
            **Rank-local**; a thread may call it. `None` where nothing is left to do.
        """


Receipts = Callable[[], list[Receipt]]


@contextmanager
def claiming(staging: Staging) -> Iterator[Callable[[], Slot]]:
    """Function that claims a slot, the same one at each call. If the block fails it is given back. **Rank-local**."""
    claimed: list[Slot] = []

    def claim() -> Slot:
        if not claimed:
            claimed.append(staging.claim())
        return claimed[0]

    try:
        yield claim
    except BaseException:
        for slot in claimed:
            slot.release()  # else it would be waited for in vain
        raise


@dataclass(frozen=True, slots=True)
class Share:
    """What this rank writes of a snapshot.

    Attributes:
        parts: All parts of the model that were selected, in order.
        files: For each part, and each training state, the state dict that this rank writes, with plain keys, without
            what `plans` has; empty on ranks that write nothing. Gathered weights are full tensors on the CPU.
        left_out: For each part the keys, relative to the part, that were left out because they were frozen. A part that
            is frozen as a whole has no file.
        slot: Where the values stand until they are written.
        writers: How the ranks that write come together.
        plans: For each part what was planned for its format, with the tensors of this rank.
        training_state: Names of the training states.
        versions: For each part the versions of modules that are recorded, by the path of the module in it.
    """

    parts: tuple[Part, ...]
    files: Mapping[str, StateDict]
    left_out: Mapping[str, Sequence[str]]
    slot: Slot
    writers: Writers
    plans: Mapping[str, Any] = field(default_factory=dict)
    training_state: tuple[str, ...] = ()
    versions: Mapping[str, Mapping[str, Version]] = field(default_factory=dict)

    @property
    def is_waited_for(self) -> bool:
        """Whether training waits for the write."""
        return self.slot.is_live

"""How often something happens during training.

Callbacks and the sampler that interleaves their evaluation batches share this rule, so they cannot disagree about when
a callback is due.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from keepbest.errors import ConfigError

IntervalType = Literal["epoch", "update", "sample", "eval"]


@dataclass(frozen=True, slots=True)
class Interval:
    """Every n epochs, optimizer updates or samples. Its text is of the form `every_n_epochs=5`.

    Attributes:
        every_n_epochs: Number of epochs; `None` if something else is counted.
        every_n_updates: Number of optimizer updates; `None` if something else is counted.
        every_n_samples: Number of samples; `None` if something else is counted.

    Raises:
        ConfigError: Unless exactly one of the three is given, as an integer > 0.
    """

    every_n_epochs: int | None = None
    every_n_updates: int | None = None
    every_n_samples: int | None = None

    def __post_init__(self) -> None:
        settings = {
            "every_n_epochs": self.every_n_epochs,
            "every_n_updates": self.every_n_updates,
            "every_n_samples": self.every_n_samples,
        }
        given = {name: n for name, n in settings.items() if n is not None}
        if len(given) != 1:
            found = ", ".join(f"{name}={n}" for name, n in given.items()) or "none"
            raise ConfigError(f"expected exactly one of {', '.join(settings)}, found {found}")
        [(name, n)] = given.items()
        if type(n) is not int or n <= 0:
            raise ConfigError(f"{name} must be an integer > 0, found {n!r}")

    @property
    def n(self) -> int:
        """The number of epochs, updates or samples."""
        return next(n for n in (self.every_n_epochs, self.every_n_updates, self.every_n_samples) if n is not None)

    @property
    def kind(self) -> Literal["epoch", "update", "sample"]:
        """The unit that is counted."""
        if self.every_n_epochs is not None:
            return "epoch"
        return "update" if self.every_n_updates is not None else "sample"

    def is_due(self, *, update: int, updates_per_epoch: int, effective_batch_size: int) -> bool:
        """Whether the interval ends with the `update`-th completed update (the first one is 1).

        An interval of samples is due at the update that completes a multiple of it, and only once if that update
        completes several.
        """
        if self.kind == "epoch":
            return update % (updates_per_epoch * self.n) == 0
        if self.kind == "update":
            return update % self.n == 0
        return update * effective_batch_size // self.n > (update - 1) * effective_batch_size // self.n

    def is_due_by(self, update: int, *, updates_per_epoch: int, effective_batch_size: int) -> bool:
        """Whether the interval has ended at least once when the `update`-th update is completed."""
        done = {"epoch": update // updates_per_epoch, "update": update, "sample": update * effective_batch_size}
        return done[self.kind] >= self.n

    def __str__(self) -> str:
        return f"every_n_{self.kind}s={self.n}"

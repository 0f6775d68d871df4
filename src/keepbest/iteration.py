"""A point in training: `TrainingIteration(epoch, update, sample, batch)`."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from keepbest.errors import IterationError

Parts = tuple[int | None, int | None, int | None, int | None]

_LARGEST = 2**63 - 1  # nobody trains for longer
_COUNT = "(0|[1-9][0-9]*)"
# Each part, in the order of its text, and the letter before its count.
_LETTERS = {"epoch": "E", "update": "U", "sample": "S", "batch": "B"}
_NOTHING = (None,) * len(_LETTERS)
_PATTERN = re.compile("".join(f"(?:(?:^|(?<=[0-9])_){letter}{_COUNT})?" for letter in _LETTERS.values()))


@dataclass(frozen=True, slots=True)
class TrainingIteration:
    """How many epochs, optimizer updates, samples and batches were completed.

    Its text is of the form `E7_U140_S8960`, without the absent parts.

    Attributes:
        epoch: Number of completed epochs; `None` if they are not counted.
        update: Number of completed optimizer updates; `None` if they are not counted.
        sample: Number of completed samples; `None` if they are not counted.
        batch: Number of completed batches; `None` if they are not counted. Count them if a metric is observed more than
            once between two updates.

    Raises:
        IterationError: If no part is given, or one is negative, not an integer, or 2**63 or more. Integers of numpy and
            of tensors are taken as such.
    """

    epoch: int | None = None
    update: int | None = None
    sample: int | None = None
    batch: int | None = None

    def __post_init__(self) -> None:
        if self.parts == _NOTHING:
            raise IterationError("TrainingIteration needs at least one of epoch, update, sample and batch")
        for name, part in zip(_LETTERS, self.parts, strict=True):
            if part is None or (type(part) is int and 0 <= part <= _LARGEST):
                continue
            whole = _as_int(name, part)
            object.__setattr__(self, name, whole)
            if whole < 0:
                raise IterationError(f"TrainingIteration: {name} must be an integer >= 0, got {whole!r}")
            if whole > _LARGEST:  # what is recorded must be read again, also in other languages
                raise IterationError(f"TrainingIteration: {name} must be at most {_LARGEST}")

    @classmethod
    def of(cls, iteration: object, parts: Mapping[str, int | None]) -> TrainingIteration:
        """Return the iteration that a call was given: `iteration` itself, or one of these `parts`.

        Raises:
            IterationError: If both were given, or neither, or `iteration` is something else.
        """
        given = {name: part for name, part in parts.items() if part is not None}
        if given and iteration is not None:
            names = ", ".join(f"{name}=" for name in given)
            raise IterationError(f"pass either a TrainingIteration or {names}, not both; got {iteration!r} too")
        if given:
            return cls(**given)
        if isinstance(iteration, cls):
            return iteration
        if iteration is None:
            raise IterationError("which iteration is it? Write epoch=..., update=..., sample=... or batch=... after it")
        raise IterationError(
            f"an iteration must be a TrainingIteration, got {iteration!r} of type {type(iteration).__name__}, which "
            "does not show what is counted; write epoch=..., update=..., sample=... or batch=... instead"
        )

    @property
    def parts(self) -> Parts:
        """The parts in the order epoch, update, sample, batch."""
        return (self.epoch, self.update, self.sample, self.batch)

    def follows(self, earlier: TrainingIteration) -> bool:
        """Whether this comes strictly after `earlier`: no part is smaller and at least one is greater.

        Raises:
            IterationError: If the two do not name the same parts.
        """
        has_greater = False
        has_smaller = False
        for mine, theirs in zip(self.parts, earlier.parts, strict=True):
            if mine == theirs:
                continue
            if mine is None or theirs is None:
                raise IterationError(
                    f"iteration {self} does not name the same parts as {earlier}; "
                    "give the same of epoch, update, sample and batch at every interval"
                )
            has_greater = has_greater or mine > theirs
            has_smaller = has_smaller or mine < theirs
        return has_greater and not has_smaller

    def __str__(self) -> str:
        return _text(self.parts)

    @classmethod
    def parse(cls, text: str) -> TrainingIteration:
        """Return the iteration with the text `text`, the inverse of `str()`.

        Raises:
            IterationError: If `text` is not of the form `E7_U140_S8960`.
        """
        match = _PATTERN.fullmatch(text)
        if match is None or not text:
            raise IterationError(f"not a training iteration: {text!r}; expected a form like E7_U140_S8960")
        return cls(*(None if part is None else int(part) for part in match.groups()))


@lru_cache(maxsize=64)  # a quiet interval shows the iteration of the best, and those of two observations
def _text(parts: Parts) -> str:
    counts = zip(_LETTERS.values(), parts, strict=True)
    return "_".join([f"{letter}{count}" for letter, count in counts if count is not None])


def _as_int(name: str, part: Any) -> int:
    is_bool = isinstance(part, bool) or str(getattr(part, "dtype", "")).endswith("bool")
    try:
        if not is_bool:
            return operator.index(part)
    except TypeError:
        pass
    raise IterationError(
        f"TrainingIteration: {name} must be an integer >= 0, got {part!r} of type {type(part).__name__}"
    )

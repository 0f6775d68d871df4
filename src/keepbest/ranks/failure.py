"""How the failure of a rank travels to the others, and which error they raise."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

from typing_extensions import Self

from keepbest import errors
from keepbest.errors import KeepBestError, RankFailedError, StorageError

NO_REMEDY = ""
"""Remedy of a step that uses files of the run, where there is nothing to advise."""


class FailureReport(NamedTuple):
    """A failure in the words of the rank that failed.

    Attributes:
        step: Step that failed.
        error_name: Name of the exception's class.
        message: Message of the exception.
        remedy: What the user can do if the file system refused.
        refused: Whether the file system refused.
        is_ours: Whether the class is one of this library. Those of others may have the same names.
    """

    step: str
    error_name: str
    message: str
    remedy: str
    refused: bool
    is_ours: bool

    @classmethod
    def of(cls, step: str, failure: BaseException, remedy: str | None) -> Self:
        """Return the report on `failure`. An `OSError` is a refusal of the file system where there is a `remedy`."""
        is_of_files = remedy is not None and isinstance(failure, OSError)
        refused = is_of_files and not isinstance(failure, KeepBestError)
        name = type(failure).__name__
        is_ours = getattr(errors, name, None) is type(failure)
        return cls(step, name, text_of(failure), remedy or "", refused, is_ours=is_ours)

    def to_text(self) -> str:
        """Return the report as text. `from_text` is the inverse."""
        return json.dumps(self._asdict())

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Return the report that `to_text` wrote."""
        return cls(**json.loads(text))

    @property
    def error_class(self) -> type[KeepBestError] | None:
        """The exception's class if it is one of this library."""
        found: type[KeepBestError] | None = getattr(errors, self.error_name) if self.is_ours else None
        return found


def cause_of(failure: BaseException) -> BaseException:
    """Return what went wrong in a collective of torch.

    Where one fails in a group that torch keeps no table of, the log of torch fails too, and hides the first failure.
    """
    hidden = failure.__context__
    return hidden if isinstance(failure, ValueError) and isinstance(hidden, RuntimeError) else failure


def text_of(failure: BaseException) -> str:
    """Return the message of an exception, which may be unable to give it."""
    try:
        return str(failure)
    except Exception as error:  # noqa: BLE001  # user code; the failure itself must still reach every rank
        return f"(its message cannot be shown: __str__ raises {type(error).__name__})"


def shared_error(mine: BaseException | None, reports: Mapping[int, FailureReport], world_size: int) -> BaseException:
    """Return the error that this rank raises when at least one rank failed. Pure.

    It has the class that the lowest failing rank raised if that is one of this library. Otherwise it is a
    `StorageError` where the file system refused, and a `RankFailedError` elsewhere.

    Args:
        mine: Failure of this rank. An interruption is returned as it is.
        reports: Reports of the ranks that failed, by rank.
        world_size: Number of ranks.
    """
    if mine is not None and not isinstance(mine, Exception):
        return mine
    first = next(iter(reports.values()))
    is_shared = len(reports) == world_size and all(report == first for report in reports.values())
    if mine is not None and is_shared and first.error_class is not None:
        return mine
    error_class = first.error_class or (StorageError if first.refused else RankFailedError)
    failures = "; ".join(
        f"rank {rank} of {world_size}: {report.error_name}: {report.message}" for rank, report in reports.items()
    )
    remedy = f". {first.remedy}" if first.refused and first.remedy else ""
    return error_class(f"failed to {first.step} on {failures}{remedy}")

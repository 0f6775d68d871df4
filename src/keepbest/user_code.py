"""Code of the user that runs where files of the run are written: an `OSError` of it is no refusal of the disk."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from keepbest.errors import KeepBestError, RankFailedError


@contextmanager
def code_of_the_user(what: str) -> Iterator[None]:
    """Raise an `OSError` of this block as a `RankFailedError`, which names `what` raised it."""
    try:
        yield
    except KeepBestError:
        raise
    except OSError as error:
        raise RankFailedError(f"{what} raised {type(error).__name__}: {error}") from error


class Log:
    """A logger whose handlers are code of the user.

    Args:
        name: Name of the logger.
    """

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def info(self, text: str, *values: object) -> None:
        self._log(logging.INFO, text, values)

    def warning(self, text: str, *values: object) -> None:
        self._log(logging.WARNING, text, values)

    def error(self, text: str, *values: object, exc_info: BaseException | None = None) -> None:
        self._log(logging.ERROR, text, values, exc_info)

    def _log(self, level: int, text: str, values: tuple[object, ...], exc_info: BaseException | None = None) -> None:
        with code_of_the_user("a handler of the log"):
            self._logger.log(level, text, *values, exc_info=exc_info, stacklevel=3)  # the line that logs

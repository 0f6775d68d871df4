"""A log that cannot be written."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class Unreachable(logging.Handler):
    """The log of a host that is gone, for one message."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.modules = text, list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        if self.text in record.getMessage():
            self.modules.append(record.module)
            raise ConnectionError("no such host")


@contextmanager
def unreachable(text: str) -> Iterator[Unreachable]:
    logger, handler = logging.getLogger("keepbest"), Unreachable(text)
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)

"""Holds up whoever writes a file, until a test has seen it."""

from __future__ import annotations

import threading

from tests.kit.files import Operation


class Gate:
    """Holds up the thread that comes to a file until it is opened."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_reached, self.is_open = threading.Event(), threading.Event()

    def __call__(self, operation: Operation) -> None:
        if operation.name == "create" and operation.path.name == self.name:
            self.is_reached.set()
            assert self.is_open.wait(60)

"""`--quick`: a test that starts a process is skipped at the moment that it does, and nobody waits for the disk.

No test is marked, so no mark can be missing or out of date.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from multiprocessing.process import BaseProcess

import pytest

# What Python reports before it starts a process. The servers of multiprocessing are not among it.
_STARTS = {"os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "subprocess.Popen"}


class NoProcesses:
    """The plugin of a quick test run."""

    def __init__(self) -> None:
        self._is_in_a_test = False
        sys.addaudithook(self._on_event)  # stays for as long as this process lives

    def _on_event(self, event: str, arguments: tuple[object, ...]) -> None:
        if event in _STARTS and self._is_in_a_test:
            pytest.skip(f"starts a process: {event} {arguments[:2]}")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        def start(process: BaseProcess) -> None:
            pytest.skip(f"starts a process: {process.name}")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BaseProcess, "start", start)
            patch.setattr(os, "fsync", lambda _: None)  # no test can see whether the disk has it
            self._is_in_a_test = True
            try:
                return (yield)
            finally:
                self._is_in_a_test = False

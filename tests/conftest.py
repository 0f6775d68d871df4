"""Settings of every test process, and of the rank processes that inherit its environment."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Test processes and their ranks share few cores. Set before torch is imported, so that forked ranks have it too.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

from tests.kit.quick import NoProcesses

torch.set_num_threads(1)
# A shell that starts the tests in the background has them ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
# How long an example takes depends on what the other test process does.
settings.register_profile("keepbest", deadline=None)
settings.register_profile("quick", deadline=None, max_examples=5)
settings.load_profile("keepbest")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="skip the tests that start a process, and explore a part of what others do"
    )
    group = parser.getgroup("faults")
    group.addoption("--kills", type=int, default=20, help="how many processes of runs are killed")
    group.addoption("--fault-seed", type=int, default=0, help="repeats the faults of an earlier test run")
    group.addoption(
        "--crash-points",
        choices=["some", "all"],
        default="some",
        help="how many of the states after a power cut",
    )
    group = parser.getgroup("slurm")
    group.addoption("--slurm", action="store_true", help="also the tests that start a SLURM cluster, and install it")
    group.addoption("--rounds", type=int, default=1, help="how often a job of a SLURM cluster is interrupted")
    group = parser.getgroup("browser")
    group.addoption("--browser", action="store_true", help="also the tests that start Chromium, and install it")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--quick"):
        settings.load_profile("quick")
        config.pluginmanager.register(NoProcesses())


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    # What is imported stays. Frameworks collect garbage in each training, and would look through all of it each time.
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


# {path: the option that it needs}
_ONLY_WITH = {"slurm": "slurm", "cli/test_report_in_browser.py": "browser"}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    option = _ONLY_WITH.get(collection_path.relative_to(Path(__file__).parent).as_posix())
    return True if option is not None and not config.getoption(option) else None

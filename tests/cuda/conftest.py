from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from tests.cuda.device import DEVICE, ON_CUDA


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what tests measured, also where they passed."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {name}: {value}")


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Skips where the device is missing, and leaves nothing on it."""
    if ON_CUDA and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if not ON_CUDA and "needs_cuda" in request.fixturenames:
        pytest.skip("means nothing on the CPU")
    torch.manual_seed(0)
    gc.collect()  # what the test before left in cycles would be freed while this one counts memory
    yield DEVICE
    if ON_CUDA:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@pytest.fixture
def needs_cuda() -> None:
    """What the test is about does not exist on the CPU."""


@pytest.fixture(params=["torch", "safetensors", "dcp"])
def file_format(request: pytest.FixtureRequest) -> str:
    if request.param == "safetensors":
        pytest.importorskip("safetensors")
    return str(request.param)


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def async_save(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)

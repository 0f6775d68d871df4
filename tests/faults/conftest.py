from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.faults.disks import mounted


@pytest.fixture
def memory_folder(tmp_path):
    """Where many runs do not wait for a disk."""
    shared_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else tmp_path) as folder:
        yield Path(folder)


@pytest.fixture
def small_disk(tmp_path):
    with mounted("-t", "tmpfs", "-o", "size=900k", "keepbest-test", at=tmp_path / "disk") as path:
        yield path

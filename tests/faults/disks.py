"""Real disks that are small, or full."""

from __future__ import annotations

import os
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(*arguments: str, at: Path):
    """A mount that ends with the block; who may not mount skips the test."""
    at.mkdir(exist_ok=True)
    made = subprocess.run(["mount", *arguments, str(at)], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"needs the right to mount: {made.stderr.strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


def fill(disk: Path) -> None:
    room = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(room.f_bavail * room.f_frsize))

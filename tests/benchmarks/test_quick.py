from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("program", "line"), [("tolerance", "tolerance event, 1 MB"), ("upload", "memory until it is uploaded, S3")]
)
def test_a_benchmark_that_needs_no_peers_runs(program, line):
    command = [sys.executable, "-m", f"benchmarks.{program}", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert line in done.stdout

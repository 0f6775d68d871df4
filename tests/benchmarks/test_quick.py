from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_benchmark_that_needs_no_peers_runs():
    command = [sys.executable, "-m", "benchmarks.tolerance", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "tolerance event, 1 MB" in done.stdout


def test_a_part_that_fails_is_named_and_fails_the_program():
    program = "from benchmarks import measure; measure.main('x', lambda _: measure.Report(failures=['host', 'none']))"
    command = [sys.executable, "-c", program, "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "failed: host, none" in done.stderr


def test_other_parts_of_the_gpu_benchmark_follow_one_that_fails():
    program = """
from benchmarks import cuda, measure

def fail(*_):
    raise RuntimeError("no such device")

cuda.raw_numbers = cuda.first_best = cuda.training_time = cuda.without_memory = cuda.durable = fail
measure.main("cuda", cuda.run)
"""
    command = [sys.executable, "-c", program, "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert "no such device" in done.stdout
    assert "observe holds up the host" in done.stdout
    assert "failed: raw, first, time 1, none, durable, time 6" in done.stderr

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = """
import multiprocessing, os, subprocess

def test_command():
    subprocess.run(["true"])

def test_fork():
    os.fork() or os._exit(0)

def test_rank():
    multiprocessing.get_context("forkserver").Process(target=print).start()

def test_none():
    pass
"""
RUN = """
import sys, pytest
from tests.kit.quick import NoProcesses
pytest.main([sys.argv[1], "-q", "-rs", "-p", "no:cacheprovider"], plugins=[NoProcesses()])
"""


def test_quick_run_skips_what_starts_a_process_and_names_it(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-c", RUN, str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert "1 passed, 3 skipped" in ended.stdout, ended.stdout + ended.stderr
    for started in ("subprocess.Popen ('true'", "os.fork", "ForkServerProcess-1"):
        assert f"starts a process: {started}" in ended.stdout

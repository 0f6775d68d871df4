"""The scripts that the command prints, and what they start."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.kit import cli_runs as runs

NAMES = sorted(path.stem.replace("_", "-") for path in (runs.ROOT / "launch").iterdir())
# One that says how it was called, and ends as it is asked to.
STAND_IN = """#!/bin/bash
printf '%s\\n' "${0##*/}" "$@"
[[ $0 != *srun ]] || exit "${STATUS:-0}"
"""


def start(name: str, folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script as a user prints it, with a command of two words at its top."""
    text, count = re.subn(r"^COMMAND=.*", "COMMAND=(train.py --name 'two words')", script(name), flags=re.MULTILINE)
    assert count == 1
    for program in ("torchrun", "srun", "scontrol"):
        (folder / program).write_text(STAND_IN)
        (folder / program).chmod(0o755)
    return subprocess.run(
        ["bash", "-c", text, name, *arguments],
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "3", **environment},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def script(name: str) -> str:
    printed = runs.keepbest("launch-script", name)
    assert printed.exit_code == 0, printed.output
    return printed.stdout


@pytest.mark.parametrize("name", NAMES)
def test_script_starts_any_command_with_its_arguments(name, tmp_path):
    done = start(name, tmp_path, "--epochs", "9 0")
    launcher, *words = done.stdout.splitlines()
    assert (done.returncode, done.stderr, launcher) == (0, "", "torchrun" if "torchrun" in name else "srun")
    python = [] if "torchrun" in name else [".venv/bin/python"]
    assert words[-5 - len(python) :] == [*python, "train.py", "--name", "two words", "--epochs", "9 0"]


@pytest.mark.parametrize("name", NAMES)
def test_usage_starts_the_script_wherever_it_was_printed_to(name, tmp_path):
    printed = tmp_path / "job of mine"
    printed.write_text(re.sub(r"^COMMAND=.*", "COMMAND=(train.py)", script(name), flags=re.MULTILINE))
    for program in ("torchrun", "srun"):
        (tmp_path / program).write_text(STAND_IN)
        (tmp_path / program).chmod(0o755)
    (tmp_path / "sbatch").symlink_to("/bin/bash")  # a script that is submitted is a script of bash
    [usage] = re.findall(r"^# {3}(\S.*)", script(name), flags=re.MULTILINE)
    done = subprocess.run(
        ["bash", "-c", usage.replace("FILE", "'job of mine'", 1).replace("[ARGUMENT ...]", "--epochs 90")],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "3"},
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-3:] == ["train.py", "--epochs", "90"]


@pytest.mark.parametrize(("status", "returns"), [(75, True), (138, True), (1, False), (0, False)])
def test_only_a_job_that_was_asked_to_stop_returns_to_the_queue(status, returns, tmp_path):
    done = start("slurm-requeue", tmp_path, STATUS=str(status), SLURM_JOB_ID="17")
    assert done.stdout.endswith("scontrol\nrequeue\n17\n") == returns
    assert done.returncode == (0 if returns else status)


def test_names_of_scripts_are_listed(tmp_path):
    listed = runs.keepbest("launch-script").stdout
    assert re.findall(r"^\S+", listed, flags=re.MULTILINE) == NAMES
    unknown = runs.keepbest("launch-script", "slurm")
    assert unknown.exit_code == 1
    assert all(name in unknown.stderr for name in NAMES)


def test_wheel_holds_the_scripts(tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(runs.ROOT / name, tmp_path)
    for name in ("src", "launch"):
        shutil.copytree(runs.ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("*.egg-info"))
    program = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, timeout=120, check=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        held = {Path(name).name: opened.read(name) for name in opened.namelist() if "/launch_scripts/" in name}
    assert held == {path.name: path.read_bytes() for path in (runs.ROOT / "launch").iterdir()}

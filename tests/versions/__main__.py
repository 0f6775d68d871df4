"""`make test-versions`: the tests on the oldest torch that the package takes, and on the newest that there is.

Each has an environment and a copy of the repository, in a temporary folder that is removed before the next one is made.
The oldest torch comes with the oldest series of what the package, the command and safetensors need. All else is new.
Arguments are those of pytest.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tomllib

from tests.versions.without_cuda import replace_cuda

ROOT = Path(__file__).resolve().parents[2]
OLD_EXTRAS = ("cli", "safetensors")
NEW_EXTRAS = ("examples", "plot", "tensorboard", "lightning", "transformers", "accelerate", "ignite", "s3", "test")
# What other targets run. Of tests/docs, pages quote the sources of the pinned versions.
LEFT_OUT = ("tests/faults", "tests/hosts", "tests/docs")
NOT_COPIED = (".git", ".venv*", "runs", "site", "build", "dist", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info")


def oldest() -> list[str]:
    """`torch==2.10.*`, where the package asks for `torch>=2.10`, and so on."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    own = [*project["dependencies"], *(each for name in OLD_EXTRAS for each in project["optional-dependencies"][name])]
    return [f"{requirement.replace('>=', '==')}.*" for requirement in own]


def run(pins: Sequence[str], arguments: Sequence[str]) -> int:
    """The exit status of the tests, in an environment with these versions."""
    with tempfile.TemporaryDirectory(prefix="keepbest-versions-") as folder:
        copy, environment = Path(folder, "keepbest"), Path(folder, "environment")
        shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
        python = environment / "bin" / "python"
        pip = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir"]
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        [torch] = [pin for pin in pins if re.match(r"torch\b", pin)]
        subprocess.run([*pip, "--no-deps", torch], check=True)
        [packages] = environment.glob("lib/python*/site-packages")
        replace_cuda(packages)
        subprocess.run([*pip, *pins, "--editable", f"{copy}[{','.join((*OLD_EXTRAS, *NEW_EXTRAS))}]"], check=True)
        shown = "import sys, torch; print(f'torch {torch.__version__}, Python {sys.version.split()[0]}', flush=True)"
        subprocess.run([python, "-c", shown], check=True)
        left_out = [f"--ignore={path}" for path in LEFT_OUT]
        command = [python, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", *left_out, *arguments]
        leftovers = Path(folder, "tmp")
        leftovers.mkdir()
        variables = {**os.environ, "PYTHONPATH": "", "TMPDIR": str(leftovers), "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(command, cwd=copy, env=variables, check=False).returncode


def main() -> None:
    """Run both, and end with 1 if one of them failed."""
    failed = [pins for pins in (oldest(), ["torch"]) if run(pins, sys.argv[1:])]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

"""What a user gets by `pip install keepbest`, and pays for `import keepbest`."""

import re
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import keepbest

# Each of these takes longer to import than all of keepbest, and only some runs need it.
SOME_RUNS_NEED = [
    "accelerate", "fsspec", "ignite", "matplotlib", "pydantic", "pytorch_lightning", "rich", "safetensors", "sympy",
    "tensorboard", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor", "torchmetrics",
    "transformers", "typer", "yaml",
]  # fmt: skip


def test_only_torch_numpy_pydantic_and_a_digest_are_required():
    required = [line for line in requires("keepbest") or [] if "extra ==" not in line]
    names = {re.match(r"[A-Za-z0-9_.-]+", line)[0] for line in required}
    assert names == {"torch", "numpy", "pydantic", "xxhash"}


def test_import_leaves_to_later_what_only_some_runs_need():
    program = f"import torch, keepbest, sys; print([name for name in {SOME_RUNS_NEED} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert loaded.stdout == "[]\n"


def test_version_is_that_of_the_package():
    assert keepbest.__version__ == version("keepbest")


def test_installed_command_says_its_version():
    command = [str(Path(sys.executable).parent / "keepbest"), "--version"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert printed == f"keepbest {version('keepbest')}\n"

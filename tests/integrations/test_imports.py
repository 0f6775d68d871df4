"""A framework is imported by its own adapter alone."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

PROGRAM = """
import importlib, pkgutil, sys, keepbest

FRAMEWORKS = ["ignite", "accelerate", "transformers", "pytorch_lightning", "lightning"]

def loaded():
    return [name for name in FRAMEWORKS if name in sys.modules]

for module in pkgutil.walk_packages(keepbest.__path__, "keepbest."):
    if module.name != "keepbest.__main__" and not module.name.startswith("keepbest.integrations."):
        importlib.import_module(module.name)
print(*loaded())
for name in ("ignite", "accelerate", "transformers", "lightning"):
    importlib.import_module(f"keepbest.integrations.{name}")
    print(*loaded())
"""


def test_framework_is_imported_by_its_own_adapter_alone():
    has_both = find_spec("lightning") is not None  # of its packages, for both of which there is one adapter
    loaded = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120)
    assert loaded.stdout.splitlines() == [
        "",
        "ignite",
        "ignite accelerate",
        "ignite accelerate transformers",  # which stands on Accelerate
        " ".join(["ignite", "accelerate", "transformers", "pytorch_lightning", *(["lightning"] * has_both)]),
    ]

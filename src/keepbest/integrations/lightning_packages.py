"""What keepbest takes from Lightning, which comes as two packages: `pytorch_lightning`, and `lightning`.

A trainer of one of them takes no callback of the other. A class that derives from those of both is a callback of each.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any


def _packages() -> list[ModuleType]:
    """Those that are installed, or the first one, whose import then says that it is missing."""
    names = {"pytorch_lightning": "pytorch_lightning", "lightning": "lightning.pytorch"}
    installed = [path for name, path in names.items() if find_spec(name)] or ["pytorch_lightning"]
    return [importlib.import_module(path) for path in installed]


_PACKAGES = _packages()


def _of_each(name: str) -> tuple[type, ...]:
    """The class of this name in each package. Older versions lack some."""
    modules = [package.callbacks for package in _PACKAGES]
    return tuple(getattr(module, name) for module in modules if hasattr(module, name))


if TYPE_CHECKING:
    from pytorch_lightning import callbacks

    Callback = callbacks.Callback
    Checkpoint = callbacks.Checkpoint
else:
    Callback = type("Callback", _of_each("Callback"), {})
    Checkpoint = type("Checkpoint", _of_each("Checkpoint"), {})

VERSION: str = _PACKAGES[0].__version__
CHECKPOINTS = _of_each("Checkpoint")
GRADIENT_ACCUMULATION_SCHEDULERS = _of_each("GradientAccumulationScheduler")
WEIGHT_AVERAGINGS = _of_each("WeightAveraging")


def monitors(checkpoint: Any) -> bool:
    """Whether a checkpoint callback of Lightning has a best of its own."""
    return getattr(checkpoint, "monitor", None) is not None

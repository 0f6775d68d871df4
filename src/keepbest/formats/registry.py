"""The formats that there are."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Literal, cast, get_args

from torch import nn

from keepbest.errors import ConfigError, SnapshotError
from keepbest.formats.format import Format
from keepbest.modules.parts import Part
from keepbest.modules.wrappers import modules_along

FormatName = Literal["torch", "safetensors", "dcp"]

# Modules, since torch's distributed checkpoints take half a second to import and safetensors is an extra.
_MODULES: dict[str, str] = {
    "torch": "keepbest.formats.torch_file",
    "safetensors": "keepbest.formats.safetensors_file",
    "dcp": "keepbest.formats.dcp",
}


def find_format(name: str) -> Format:
    """The format of this name. Raises `SnapshotError` if there is none: the name is one that a manifest has."""
    if name not in _MODULES:
        raise SnapshotError(f"the snapshot is of format {name!r}; this version reads {', '.join(_MODULES)}")
    return cast("Format", import_module(_MODULES[name]).FORMAT)


def check_format(name: str, model: nn.Module, parts: Sequence[Part]) -> FormatName:
    """`name`, after a check that this format can hold the weights of `parts`. **Rank-local**.

    Raises:
        ConfigError: If it is no format, or cannot hold them, or what reads it is not installed.
    """
    if name not in get_args(FormatName):
        raise ConfigError(f"format must be one of {', '.join(get_args(FormatName))}, got {name!r}")
    for part in parts:
        along = modules_along(model, part.path)
        if along is not None:
            find_format(name).check(part.name, along[-1][1])
    return cast("FormatName", name)

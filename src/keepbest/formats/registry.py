"""The formats that there are."""

from __future__ import annotations

from importlib import import_module
from typing import Literal, cast, get_args

from keepbest.errors import ConfigError, SnapshotError
from keepbest.formats.format import Format

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


def check_format(name: str) -> FormatName:
    """`name`, after a check that there is this format, and what it needs. **Rank-local**.

    Raises:
        ConfigError: If it is no format, or what it needs is not installed.
    """
    if name not in get_args(FormatName):
        raise ConfigError(f"format must be one of {', '.join(get_args(FormatName))}, got {name!r}")
    find_format(name).check()
    return cast("FormatName", name)

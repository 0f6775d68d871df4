"""The formats that weights are written in.

`torch` and `safetensors` are one file for each part of the model, written by rank 0. `dcp` is a folder for each part,
of torch's distributed checkpoints, to which every rank writes what it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

from torch import nn

from keepbest.errors import ConfigError, SnapshotError
from keepbest.formats import safetensors_file, torch_file
from keepbest.modules.parts import Part
from keepbest.modules.wrappers import modules_along
from keepbest.run.files import Files

Format = Literal["torch", "safetensors", "dcp"]
SHARDED_ENDING = ".dcp"
SHARDED_METADATA = ".metadata"


def is_sharded(files: Iterable[str]) -> bool:
    """Whether a snapshot with files of these names is of format `dcp`."""
    return any("/" in name for name in files)


class FileFormat(NamedTuple):
    """How a state dict becomes a file, and back; see the modules of the formats."""

    ending: str
    write: Callable[[Files, Path, Mapping[str, Any]], dict[str, Any]]
    read: Callable[[Path], dict[str, Any]]


FILE_FORMATS = {
    "torch": FileFormat(torch_file.ENDING, torch_file.write_state_dict, torch_file.read_state_dict),
    "safetensors": FileFormat(
        safetensors_file.ENDING, safetensors_file.write_state_dict, safetensors_file.read_state_dict
    ),
}


def read_state_dict(path: Path) -> dict[str, Any]:
    """The state dict in a file of any of `FILE_FORMATS`. **Rank-local**.

    Raises:
        SnapshotError: if it holds anything but plain weights, or is of no known format.
        ConfigError: if a package that reads it is not installed.
    """
    for file_format in FILE_FORMATS.values():
        if path.suffix == file_format.ending:
            return file_format.read(path)
    raise SnapshotError(f"{path} is of no known format")


def check_format(name: str, model: nn.Module, parts: Sequence[Part]) -> Format:
    """`name`, after it was found to be able to hold the weights of `parts`. **Rank-local**.

    Raises:
        ConfigError: if it is no format, or cannot hold them, or what reads it is not installed.
    """
    if name not in get_args(Format):
        raise ConfigError(f"format must be one of {', '.join(get_args(Format))}, got {name!r}")
    if name == "safetensors":
        safetensors_file.require_safetensors()
        for part in parts:
            along = modules_along(model, part.path)
            if along is not None:
                _check_holds_plain_tensors(along[-1][1], part.name)
    return cast("Format", name)


def _check_holds_plain_tensors(whole: nn.Module, part: str) -> None:
    for path, module in whole.named_modules():
        where = f"{path or 'the model'} in {part!r}"
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ConfigError(
                f"format 'safetensors' holds tensors only, but {where} has an extra state; use format 'torch' or 'dcp'"
            )
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dtype not in safetensors_file.DTYPES:
                raise ConfigError(
                    f"format 'safetensors' cannot hold {key!r} of {where}, which is {parameter.dtype}; "
                    "use format 'torch' or 'dcp'"
                )

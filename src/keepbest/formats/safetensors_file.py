"""One state dict as a safetensors file, written in a single pass with its digest.

The format (https://huggingface.co/docs/safetensors): eight bytes with the length of a JSON header, the header, the
bytes of the tensors. The package `safetensors` reads it; it would write it from memory that holds the whole file once
more, and could not sync it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from keepbest.errors import ConfigError, SnapshotError
from keepbest.formats import torch_file
from keepbest.formats.entries import FileEntry
from keepbest.formats.format import StateDict, special_kind
from keepbest.formats.tied import first_names
from keepbest.formats.whole_file import WholeFileFormat, can_be_mapped
from keepbest.modules.raw_bytes import buffer_of
from keepbest.run.digest import Digest, DigestingFile
from keepbest.run.files import Files

_METADATA = "__metadata__"
_IS_NO_TENSOR = "has the name that a safetensors file has for what is no tensor"
_TIED = "tied"  # key of the header's metadata: {name: name of the tensor that it is one with}, as JSON
_ALIGNMENT = 8
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}


class SafetensorsFile(WholeFileFormat):
    """Files that the package `safetensors` reads. A tensor with several names is written once."""

    name = "safetensors"
    ending = ".safetensors"

    @property
    def for_state(self) -> WholeFileFormat:
        return torch_file.FORMAT

    def check(self) -> None:
        require_safetensors()

    def cannot_hold(self, key: str, value: object) -> str | None:
        if key == _METADATA:
            return f"{_IS_NO_TENSOR}; give it another name, or use format 'torch' or 'dcp'"
        if not isinstance(value, torch.Tensor):
            return (
                f"in the state dict is a {type(value).__name__}, and format 'safetensors' holds tensors only; "
                "use format 'torch' or 'dcp'"
            )
        if kind := special_kind(value):
            return f"is {kind}, which format 'safetensors' cannot hold; use format 'torch'"
        if value.dtype not in DTYPES:
            return f"is {value.dtype}, which format 'safetensors' cannot hold; use format 'torch' or 'dcp'"
        return None

    def write_file(self, files: Files, path: Path, state: StateDict, *, is_waited_for: bool) -> Digest:
        for key, value in state.items():
            if not isinstance(value, torch.Tensor):
                raise SnapshotError(
                    f"a safetensors file holds tensors only, but {key!r} in the state dict is a "
                    f"{type(value).__name__}; use format 'torch'"
                )
        tied = first_names(state)
        stored = {key: value.detach() for key, value in state.items() if key not in tied}
        entries = [
            FileEntry(key, tensor.shape, tensor.dtype, partial(stored.__getitem__, key))
            for key, tensor in stored.items()
        ]
        return write_entries(files, path, entries, tied, is_waited_for=is_waited_for)

    def read_file(self, path: Path) -> dict[str, Any]:
        require_safetensors()
        return dict(_read(path))


FORMAT = SafetensorsFile()


def require_safetensors() -> None:
    """Check that what is written can be read again. **Rank-local**. Raises `ConfigError` if the package is missing."""
    try:
        import safetensors.torch  # noqa: F401  # an extra
    except ImportError as error:
        raise ConfigError("format 'safetensors' needs: pip install 'keepbest[safetensors]'") from error


def write_entries(
    files: Files, path: Path, entries: Sequence[FileEntry], tied: Mapping[str, str], *, is_waited_for: bool
) -> Digest:
    """Write tensors durably to a new file, one at a time.

    Args:
        files: Operations that change the folder.
        path: New file.
        entries: Tensors, each fetched when its turn comes and released after it.
        tied: Further names of these tensors, and the key of each.
        is_waited_for: Whether somebody waits for the file.

    Raises:
        SnapshotError: If a tensor is of a kind that the format does not know.
        OSError: Any refusal of the file system.
    """
    # As the package does: wide types first, so that each tensor lies where it can be mapped from.
    entries = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.key))
    with files.create(path) as file:
        sink = DigestingFile(file, is_waited_for=is_waited_for)
        sink.write(_header(entries, {_TIED: json.dumps(tied)} if tied else {}))
        for entry in entries:
            tensor = entry.fetch()
            if kind := special_kind(tensor):
                raise SnapshotError(f"a safetensors file cannot hold {entry.key!r}, which is {kind}")
            if tensor.numel():
                sink.write(buffer_of(tensor))
        sink.sync()
    return sink.digest


def _read(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import SafetensorError  # an extra

    try:
        tensors, metadata = _read_mapped(path) if can_be_mapped(path) else _read_bytes(path)
        tied = json.loads(metadata.get(_TIED, "{}"))
        yield from tensors.items()
        yield from ((name, tensors[first]) for name, first in tied.items())
    except (SafetensorError, OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise SnapshotError(f"{path} cannot be read as weights: {type(error).__name__}: {error}") from error


def _read_mapped(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    from safetensors import safe_open  # an extra

    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118  # no mapping


def _read_bytes(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    from safetensors.torch import load  # an extra

    data = path.read_bytes()
    tensors = load(data)  # checks the header, too
    (size,) = struct.unpack_from("<Q", data)
    return tensors, json.loads(data[8 : 8 + size]).get(_METADATA, {})


def _header(entries: Sequence[FileEntry], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {_METADATA: {"format": "pt", **metadata}}
    end = 0
    for entry in entries:
        if entry.key == _METADATA:
            raise SnapshotError(f"{entry.key!r} {_IS_NO_TENSOR}; give it another name")
        if entry.dtype not in DTYPES:
            raise SnapshotError(f"a safetensors file cannot hold {entry.key!r}, which is {entry.dtype}")
        start, end = end, end + entry.bytes
        header[entry.key] = {"dtype": DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text

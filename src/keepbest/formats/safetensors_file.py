"""One state dict as a safetensors file, written in a single pass with its digest.

The format (https://huggingface.co/docs/safetensors): eight bytes with the length of a JSON header, the header, the
bytes of the tensors. The package `safetensors` reads it; it would write it from memory that holds the whole file once
more, and could not sync it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from keepbest.errors import ConfigError, SnapshotError
from keepbest.run.digest import DigestingFile
from keepbest.run.files import Files

ENDING = ".safetensors"
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


class Entry(NamedTuple):
    """A tensor that is to be written: what is known before it is there, and how to get it."""

    key: str
    shape: Sequence[int]
    dtype: torch.dtype
    fetch: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        """That it takes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def require_safetensors() -> None:
    """Find out now whether what is written can be read again. **Rank-local**.

    Raises:
        ConfigError: if the package is not installed.
    """
    try:
        import safetensors.torch  # noqa: F401  # an extra
    except ImportError as error:
        raise ConfigError("format 'safetensors' needs: pip install 'keepbest[safetensors]'") from error


def write_state_dict(files: Files, path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Write `state` durably to a new file.

    A tensor that has several names is written once; the header tells the others.

    Returns:
        What is recorded of the file: size, digest, and the number of `tensors`.

    Raises:
        SnapshotError: if there is something in it that is no tensor, or is of a kind that the format does not know.
        OSError: whatever the file system answers.
    """
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise SnapshotError(
                f"a safetensors file holds tensors only, but {key!r} in the state dict is a {type(value).__name__}; "
                "use format 'torch'"
            )
    return {**write_entries(files, path, *entries_of(state)), "tensors": len(state)}


def entries_of(state: Mapping[str, torch.Tensor]) -> tuple[list[Entry], dict[str, str]]:
    """The different tensors of a state dict; and, for each further name of one of them, its first name."""
    entries: list[Entry] = []
    tied: dict[str, str] = {}
    first_names: dict[Any, str] = {}
    for key, value in state.items():
        tensor = value.detach()
        same = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else key
        if same in first_names:
            tied[key] = first_names[same]
        else:
            first_names[same] = key
            entries.append(Entry(key, tensor.shape, tensor.dtype, lambda tensor=tensor: tensor))  # type: ignore[misc]
    return entries, tied


def write_entries(files: Files, path: Path, entries: Sequence[Entry], tied: Mapping[str, str]) -> dict[str, Any]:
    """Write tensors durably to a new file, each fetched when its turn comes and let go of after.

    Raises as `write_state_dict`.
    """
    # As the package does: wide types first, so that each tensor lies where it can be mapped from.
    entries = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.key))
    with files.create(path) as file:
        sink = DigestingFile(file)
        sink.write(_header(entries, {_TIED: json.dumps(tied)} if tied else {}))
        for entry in entries:
            tensor = entry.fetch()
            if tensor.numel():
                flat = tensor.contiguous().reshape(-1)
                sink.write(flat.view(torch.uint8).numpy().data)
        file.sync()
    return sink.record


def read_state_dict(path: Path) -> dict[str, Any]:
    """The state dict in `path`; tensors that were tied are one again. **Rank-local**.

    Raises:
        SnapshotError: if the file is no safetensors file.
        ConfigError: if the package is not installed.
    """
    require_safetensors()
    return dict(_read(path))


def _read(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open  # an extra

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no mapping
            tied = json.loads((file.metadata() or {}).get(_TIED, "{}"))
            yield from tensors.items()
            yield from ((name, tensors[first]) for name, first in tied.items())
    except (SafetensorError, ValueError, LookupError, AttributeError) as error:
        raise SnapshotError(f"{path} cannot be read as weights: {type(error).__name__}: {error}") from error


def _header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for entry in entries:
        if entry.dtype not in DTYPES:
            raise SnapshotError(f"a safetensors file cannot hold {entry.key!r}, which is {entry.dtype}")
        start, end = end, end + entry.bytes
        header[entry.key] = {"dtype": DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text

"""One state dict as a file of `torch.save`, written in a single pass with its digest."""

from __future__ import annotations

import contextlib
import io
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_crc32_options, set_crc32_options

from keepbest.errors import SnapshotError
from keepbest.formats.format import StateDict
from keepbest.formats.plain_load import check_sizes, load_plain
from keepbest.formats.tied import first_names
from keepbest.formats.whole_file import WholeFileFormat
from keepbest.modules.kinds import is_dense
from keepbest.modules.nested import leaves
from keepbest.run.digest import Digest, DigestingFile
from keepbest.run.files import Files

# A file of fewer bytes is made in memory first: torch writes each tensor in five pieces, however small it is.
_SMALL = 1 << 24


class TorchFile(WholeFileFormat):
    """Files that a bare `torch.load(path, weights_only=True)` reads."""

    name = "torch"
    ending = ".pt"

    def write_file(self, files: Files, path: Path, state: StateDict, *, is_waited_for: bool) -> Digest:
        tied = first_names({key: value for key, value in state.items() if isinstance(value, torch.Tensor)})
        dtypes: dict[int, torch.dtype] = {}
        compact = {key: _compact(value, dtypes) for key, value in state.items() if key not in tied}
        compact |= {key: compact[first] for key, first in tied.items()}
        ordered = _like(state, {key: compact[key] for key in state})
        with files.create(path) as file, without_crc32():
            sink = DigestingFile(file, is_waited_for=is_waited_for)
            if _is_small(compact.values()):
                torch.save(ordered, memory := io.BytesIO())
                sink.write(memory.getbuffer())
            else:
                with showing_causes():
                    torch.save(ordered, sink)  # type: ignore[arg-type]  # it needs write and flush only
            sink.sync()
        return sink.digest

    def read_file(self, path: Path) -> dict[str, Any]:
        # The tensors are mapped from the file, where that is possible.
        state = load_plain(path)
        if not isinstance(state, dict):
            raise SnapshotError(f"{path} holds a {type(state).__name__}, not a state dict")
        check_sizes(path, state)
        return state


FORMAT = TorchFile()


def _is_small(values: Iterable[Any]) -> bool:
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return all(value.layout == torch.strided for value in tensors) and sum(value.nbytes for value in tensors) < _SMALL


@contextlib.contextmanager
def showing_causes() -> Iterator[None]:
    """Raise what went wrong in a write: an error of the disk, or an interruption.

    `torch.save` finishes its file all the same, which then fails too, and hides the first failure.
    """
    handled = sys.exc_info()[1]  # whoever saves may do so while it handles an error of its own
    try:
        yield
    except RuntimeError as error:
        first = error.__context__
        if first is None or first is handled or error.__cause__ is not None:
            raise
        raise first from error


@contextlib.contextmanager
def without_crc32() -> Iterator[None]:
    """Let torch write no checksum of each tensor: that takes half as long as the write, and a file has a digest."""
    before = get_crc32_options()
    set_crc32_options(compute_crc32=False)
    try:
        yield
    finally:
        set_crc32_options(compute_crc32=before)


def _compact(value: Any, dtypes: dict[int, torch.dtype]) -> Any:
    """Return `value` with tensors that torch can save. `dtypes` has the dtype of each storage that was seen before."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return value.clone(memory_format=torch.contiguous_format) if _is_view(value, dtypes) else value
    if type(value) not in (dict, OrderedDict, list, tuple) or not any(
        _is_view(each, dtypes) for _, each in leaves(value)
    ):
        return value
    inside: Iterable[Any] = (_compact(each, dtypes) for each in (value.values() if isinstance(value, dict) else value))
    return _like(value, dict(zip(value, inside, strict=True))) if isinstance(value, dict) else type(value)(inside)


def _like(original: Mapping[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """`state`, with what torch notes beside the keys of a state dict, if `original` is one of torch's."""
    if not isinstance(original, OrderedDict):
        return state
    vars(made := OrderedDict(state)).update(vars(original))
    return made


def _is_view(value: object, dtypes: dict[int, torch.dtype]) -> bool:
    """Whether a tensor needs a storage of its own."""
    if not is_dense(value):
        return False  # what is sparse has none
    storage = value.untyped_storage()
    if not value.numel():
        return storage.data_ptr() != 0  # a tensor of another dtype may begin at the same place of a mapped file
    # A view would drag the whole storage that it looks into along into the file, and torch writes one dtype of each.
    is_of_another_dtype = dtypes.setdefault(storage.data_ptr(), value.dtype) != value.dtype
    return storage.nbytes() != value.nbytes or is_of_another_dtype

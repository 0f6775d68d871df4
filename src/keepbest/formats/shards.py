"""Reads tensors out of a file into which `torch.save` wrote one after the other. **Rank-local**.

`torch.load` takes far longer to understand a small tensor than to read it. So the bytes around the values in the file
are compared with those that `torch.save` writes here around a tensor of the same shape and dtype. Where they are equal,
the values are read as they are. All else is left to `torch.load`, such as a file that another version of torch wrote.
"""

from __future__ import annotations

from typing import Any, BinaryIO, NamedTuple

import torch

from keepbest.formats.plain_load import load_plain_bytes
from keepbest.formats.torch_file import without_crc32
from keepbest.modules.raw_bytes import raw_bytes

_MARK = 0xA5  # first byte of a tensor's values, with which no other record of a file of `torch.save` begins


class Shard(NamedTuple):
    """Where a tensor lies, and what it is expected to be.

    Attributes:
        key: Key of the tensor that it is a part of.
        file: Name of the file.
        offset: Byte of the file at which it begins.
        length: Bytes that it takes there.
        shape: Shape of it.
        dtype: Dtype of it.
    """

    key: str
    file: str
    offset: int
    length: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes of its values alone."""
        return self.shape.numel() * self.dtype.itemsize


class ShardReader:
    """Reads shards, and remembers what surrounds the values of each kind of tensor."""

    def __init__(self) -> None:
        self._frames: dict[tuple[torch.Size, torch.dtype], _Frame | None] = {}

    def read(self, file: BinaryIO, shard: Shard) -> Any:
        """Read a shard from its file. No code is run.

        Returns:
            The tensor, or anything else that is there instead.

        Raises:
            Exception: Any refusal of the file system or of `torch.load`.
        """
        file.seek(shard.offset)
        if (tensor := self._read_framed(file, shard)) is not None:
            return tensor
        file.seek(shard.offset)
        return load_plain_bytes(file.read(shard.length))

    def _read_framed(self, file: BinaryIO, shard: Shard) -> torch.Tensor | None:
        if not 0 < shard.bytes < shard.length:
            return None
        frame = self._frame(shard.shape, shard.dtype)
        if frame is None or file.read(len(frame.head)) != frame.head:
            return None
        tensor = torch.empty(shard.shape, dtype=shard.dtype, device="cpu")
        read = file.readinto(raw_bytes(tensor).numpy().data)  # type: ignore[attr-defined]  # every binary file has it
        is_whole = read == shard.bytes and len(frame.head) + read + len(frame.tail) == shard.length
        return tensor if is_whole and file.read(len(frame.tail)) == frame.tail else None

    def _frame(self, shape: torch.Size, dtype: torch.dtype) -> _Frame | None:
        kind = shape, dtype
        if kind not in self._frames:
            self._frames[kind] = _frame_around(torch.empty(shape, dtype=dtype, device="cpu"))
        return self._frames[kind]


class _Frame(NamedTuple):
    """What `torch.save` writes before and after the values of a tensor."""

    head: bytes
    tail: bytes


class _FrameSink:
    """A file object that keeps what surrounds the values of a tensor, and not the values, which may be many."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.pieces = [bytearray()]

    def write(self, data: memoryview) -> int:
        # torch writes the values in one piece.
        if data.nbytes == self._size and data[0] == _MARK:
            self.pieces.append(bytearray())
        else:
            self.pieces[-1] += data
        return data.nbytes

    def flush(self) -> None:
        """Nothing is buffered; part of the protocol of a file object."""


def _frame_around(tensor: torch.Tensor) -> _Frame | None:
    values = raw_bytes(tensor)
    values[0] = _MARK
    sink = _FrameSink(values.numel())
    with without_crc32():
        torch.save(tensor, sink)  # type: ignore[arg-type]  # it needs write and flush only
    return _Frame(*map(bytes, sink.pieces)) if len(sink.pieces) == 2 else None

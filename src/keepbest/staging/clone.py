"""How weights are copied on their device into one piece of its memory. Pure: nothing is copied here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum, auto
from itertools import accumulate, groupby, islice
from typing import NamedTuple

import torch

from keepbest.modules.raw_bytes import raw_bytes
from keepbest.staging.batch import Series, are_in_order
from keepbest.staging.rooms import Block, Row

_CONCATENATED = frozenset(
    (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)
)  # dtypes that are copied as they are; others are as bytes
_INDEXED = (1 << 31) - 1  # bytes: torch concatenates so many values by one kernel, and more one tensor at a time
_ALIGNED = 512  # bytes, as torch aligns what it allocates on a device
_DIMENSIONS = 4  # torch concatenates tensors of more by one copy of each
_MANY = 32  # tensors, of which the views take as long as a call

Filled = tuple[Row, Series]
"""A row on the host, and what it is to hold."""


class Copy(NamedTuple):
    """One copy on the device.

    Attributes:
        values: What is copied: tensors that torch is to concatenate, or a single one.
        place: Where to.
    """

    values: list[torch.Tensor]
    place: torch.Tensor

    def make(self) -> None:
        """Copy the values as they are now. It needs no further memory of the device."""
        if len(self.values) == 1:
            self.place.copy_(self.values[0])
        else:
            torch.cat(self.values, out=self.place)


class Clone(NamedTuple):
    """Rows of one dtype on the device.

    Attributes:
        rows: Rows on the host, and what each is to hold.
        place: Room on the device for all of it, of one dimension: of that dtype, or of bytes.
    """

    rows: Sequence[Filled]
    place: torch.Tensor

    def copies(self) -> Iterator[Copy]:
        """What fills it."""
        flat = raw_bytes if self.place.dtype == torch.uint8 else torch.Tensor.flatten
        for kind, group in groupby(self._pieces(), key=lambda piece: piece.kind):
            pieces = list(group)
            if kind is _Kind.ONE_OF_MANY:
                values = [value for piece in pieces for value in map(flat, piece.values)]
                yield Copy(values, self.place[pieces[0].begin : pieces[-1].end])
                continue
            for piece in pieces:
                place = self.place[piece.begin : piece.end].view(piece.values[0].dtype)
                yield Copy(piece.values, place.view(piece.shape))

    def parts(self) -> list[torch.Tensor]:
        """Each row on the device."""
        return list(torch.split(self.place, [len(self.on_host(row)) for row, _ in self.rows]))

    def on_host(self, row: Row) -> torch.Tensor:
        """A row on the host, of the dtype of `place`."""
        return row.whole.view(self.place.dtype)

    def _pieces(self) -> Iterator[_Piece]:
        end = 0
        for row, series in self.rows:
            values, width = iter(series.values), row.whole.itemsize // self.place.itemsize
            for block in row.blocks:
                begin, end = end, end + block.whole.numel() * width
                of_block = list(islice(values, len(block.keys)))
                if series.is_in_order:
                    is_whole = self.place.dtype != torch.uint8 and _is_copied_as_it_is(block)
                    kind = _Kind.WHOLE if is_whole else _Kind.ONE_OF_MANY
                    yield _Piece(kind, of_block, begin, end, block.whole.shape)
                    continue
                for value in of_block:
                    kind = _Kind.ONE_OF_MANY if are_in_order([value]) else _Kind.WHOLE
                    after = begin + value.numel() * width
                    yield _Piece(kind, [value], begin, after, value.shape)
                    begin = after


class _Kind(Enum):
    """How a piece is copied."""

    ONE_OF_MANY = auto()  # together with those beside it, by one call
    WHOLE = auto()  # by a call of its own


class _Piece(NamedTuple):
    kind: _Kind
    values: list[torch.Tensor]
    begin: int
    end: int
    shape: torch.Size


def fitting(sizes: Sequence[int], room: int) -> int:
    """How many of the first rows, of so many bytes each, go into so many bytes."""
    return sum(end <= room for end in accumulate(map(_aligned, sizes)))


def room_for(sizes: Sequence[int]) -> int:
    """Bytes of a device that rows of these sizes need at most."""
    return sum(map(_aligned, sizes))


def clones_in(memory: torch.Tensor, rows: Sequence[Filled]) -> list[Clone]:
    """Clones of rows in memory of their device, for which it suffices."""
    groups = _at_once(rows)
    sizes = [sum(row.whole.nbytes for row, _ in group) for group in groups]
    starts = accumulate(map(_aligned, sizes), initial=0)
    return [
        Clone(group, memory[start : start + size].view(copied_as(group[0][0].whole.dtype)))
        for group, start, size in zip(groups, starts, sizes, strict=False)
    ]


def copied_as(dtype: torch.dtype) -> torch.dtype:
    """The dtype as which values of a dtype are concatenated."""
    return dtype if dtype in _CONCATENATED else torch.uint8


def _is_copied_as_it_is(block: Block) -> bool:
    """Whether it is worth a call of its own: a view of each tensor takes time too, and this needs none.

    Values of whole words are copied by the same kernel as those of one dimension.
    """
    return block.is_one and block.has_words and block.whole.dim() <= _DIMENSIONS and len(block.keys) >= _MANY


def _at_once(rows: Sequence[Filled]) -> list[list[Filled]]:
    """Rows of one dtype together, as far as torch copies them by one kernel."""
    groups: list[list[Filled]] = []
    latest: dict[torch.dtype, tuple[list[Filled], int]] = {}
    for row, series in rows:
        group, count = latest.get(row.whole.dtype, ([], 0))
        if not group or count + row.whole.nbytes > _INDEXED:
            group, count = [], 0
            groups.append(group)
        group.append((row, series))
        latest[row.whole.dtype] = group, count + row.whole.nbytes
    return groups


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED

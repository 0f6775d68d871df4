"""Room on the host for each tensor of a snapshot, filled again and again. **Rank-local**."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch

from keepbest.staging.memory import Bytes, Memory, Size
from keepbest.staging.slot import Like

_SMALL = 1 << 15  # values: more are copied by several threads, if they are copied by themselves
_WORD = 16  # bytes
_ROW = 1 << 26  # bytes: large enough for a device to copy at full speed, and pinned in a few milliseconds


class Block(NamedTuple):
    """Tensors side by side that differ in their first dimension alone.

    Attributes:
        keys: Their keys, in order.
        whole: All of them, as one tensor.
        is_one: Whether `whole` is what torch makes of them if it concatenates them. It cannot where they have no
            dimension.
        is_small: Whether torch copies each of them on one thread.
        has_words: Whether each of them fills whole words of a device.
    """

    keys: Sequence[str]
    whole: torch.Tensor
    is_one: bool
    is_small: bool
    has_words: bool


class Row(NamedTuple):
    """Tensors of one dtype that lie one after the other.

    Attributes:
        keys: Their keys, in order.
        whole: All of them, as one tensor of one dimension.
        blocks: The same, in blocks.
    """

    keys: Sequence[str]
    whole: torch.Tensor
    blocks: Sequence[Block]


class Rooms:
    """Contiguous CPU tensors by key, each with a storage of its own, in rows that can be copied at once.

    They are pinned where the values come from a CUDA device.

    Args:
        memory: Memory that they lie in.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._tensors: dict[str, torch.Tensor] = {}  # replaced and not changed, since a writer may still look into it
        self._wanted: Mapping[str, Like] | None = None  # what room was made for last, if it is all there
        self.rows: list[Row] = []

    def make(self, wanted: Mapping[str, Like]) -> None:
        """Make room for what has none yet, or none of this shape. The values in other rooms may be gone.

        Raises:
            MemoryError: If there is no memory for it.
        """
        if wanted is self._wanted:
            return
        lacking = {key: like for key, like in wanted.items() if not self._has(key, like)}
        if not lacking:
            self._wanted = wanted
            return
        # Also what lies beside something that is gone: else a small tensor could keep the memory of a large one.
        broken = [row.keys for row in self.rows if not lacking.keys().isdisjoint(row.keys)]
        in_rows = {key for row in self.rows for key in row.keys}.difference(*broken)
        lacking = {key: like for key, like in wanted.items() if key in lacking or (like.nbytes and key not in in_rows)}
        self.drop(lacking)  # what is no longer needed makes room first
        made = {key: like.empty() for key, like in lacking.items() if not like.nbytes}
        for (like, keys), memory in zip(rows_of(lacking), self._memory.take(sizes_of(lacking)), strict=True):
            made |= self._lay_out(like.dtype, {key: lacking[key].shape for key in keys}, memory)
        self._tensors = self._tensors | made
        self._wanted = wanted

    def make_later(self, wanted: Mapping[str, Like]) -> Callable[[], None]:
        """Function that makes room, if these rooms are still there then. It does not keep them."""
        make = weakref.WeakMethod(self.make)

        def make_if_there() -> None:
            if (make_now := make()) is not None:
                make_now(wanted)

        return make_if_there

    def get(self, key: str, like: Like) -> torch.Tensor:
        """The room of a key, made if need be. Raises as `make`."""
        if not self._has(key, like):
            self.make({key: like})
        return self._tensors[key]

    @property
    def made(self) -> Mapping[str, torch.Tensor]:
        """All rooms that there are now."""
        return self._tensors

    def drop(self, keys: Iterable[str]) -> None:
        """Free the rooms of these keys. A row is freed when all in it are."""
        self._wanted = None
        gone = set(keys)
        self._tensors = {key: room for key, room in self._tensors.items() if key not in gone}
        self.rows = [row for row in self.rows if all(key in self._tensors for key in row.keys)]

    def keep(self, keys: set[str]) -> None:
        """Free all other rooms."""
        if gone := self._tensors.keys() - keys:
            self.drop(gone)

    def _has(self, key: str, like: Like) -> bool:
        held = self._tensors.get(key)
        return held is not None and held.dtype == like.dtype and held.shape == tuple(like.shape)

    def _lay_out(
        self, dtype: torch.dtype, shapes: Mapping[str, Sequence[int]], memory: Bytes
    ) -> dict[str, torch.Tensor]:
        """The room of each tensor in a new row."""
        rooms, start = dict[str, torch.Tensor](), 0
        for key, shape in shapes.items():
            count = torch.Size(shape).numel() * dtype.itemsize
            # From a buffer, so that it is no view: a view would drag the whole row along into a file.
            values = torch.frombuffer(memory, dtype=torch.uint8, count=count, offset=start)
            rooms[key] = values.view(dtype).view(tuple(shape))
            start += count
        whole = torch.from_numpy(memory).view(dtype)
        self.rows.append(Row(tuple(shapes), whole, list(_blocks(shapes, whole))))
        return rooms


def rows_of(wanted: Mapping[str, Like]) -> list[tuple[Like, list[str]]]:
    """Which tensors lie in one row: those of one dtype and kind of device, up to the size of a row.

    Those without elements lie in none: a single one would have torch concatenate the others by its slowest kernel.
    """
    rows: list[tuple[Like, list[str]]] = []
    open_rows: dict[tuple[torch.dtype, str], tuple[int, list[str]]] = {}
    filled = ((key, like) for key, like in wanted.items() if like.nbytes)
    for key, like in sorted(filled, key=lambda item: _block_of(item[1].shape, item[1].dtype)):
        kind = like.dtype, like.device
        size, keys = open_rows.get(kind, (0, []))
        if not keys or size + like.nbytes > _ROW:
            size, keys = 0, []
            rows.append((like, keys))
        keys.append(key)
        open_rows[kind] = size + like.nbytes, keys
    return rows


def _blocks(shapes: Mapping[str, Sequence[int]], whole: torch.Tensor) -> Iterator[Block]:
    start = 0
    for kind, group in groupby(shapes, key=lambda key: _block_of(shapes[key], whole.dtype)):
        is_odd, is_small, dimensions, rest = kind
        keys = tuple(group)
        end = start + sum(torch.Size(shapes[key]).numel() for key in keys)
        is_one = dimensions > 0
        values = whole[start:end]
        yield Block(keys, values.view(-1, *rest) if is_one else values, is_one, is_small, not is_odd)
        start = end


def _block_of(shape: Sequence[int], dtype: torch.dtype) -> tuple[bool, bool, int, tuple[int, ...]]:
    """What the tensors of one block have in common, in the order of the blocks.

    Those that do not fill whole words come last: on a CUDA device `torch.cat` copies what comes after them by values,
    and what comes before by words. Then: whether they are small, their dimensions, and the sizes of all but the first.
    """
    count = torch.Size(shape).numel()
    return count * dtype.itemsize % _WORD > 0, count < _SMALL, len(shape), tuple(shape[1:])


def sizes_of(wanted: Mapping[str, Like]) -> list[Size]:
    """How much memory each row needs."""
    return [
        Size(sum(wanted[key].nbytes for key in keys), is_pinned=like.device == "cuda") for like, keys in rows_of(wanted)
    ]

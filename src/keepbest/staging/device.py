"""From CUDA devices to the host, while training continues. **Rank-local**."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, islice, product
from typing import NamedTuple

import torch

from keepbest.modules.raw_bytes import raw_bytes
from keepbest.staging.batch import Series
from keepbest.staging.rooms import Block, Row

_CONCATENATED = frozenset(
    (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)
)  # dtypes that are copied as they are; others are as bytes
_INDEXED = (1 << 31) - 1  # bytes: torch concatenates so many values by one kernel, and more one tensor at a time
# torch has a kernel for pieces of whole 16 bytes, one for those that begin at such, and one for all others.
_KINDS_OF_PIECES = (slice(0, 512), slice(0, 8), slice(8, 16))
_ALIGNED = 512  # bytes, as torch aligns what it allocates on a device
_DIMENSIONS = 4  # torch concatenates tensors of more by one copy of each
_MANY = 32  # tensors, of which the views take as long as a call

Values = Sequence[torch.Tensor]


class _Clone(NamedTuple):
    """Rows of one dtype on the device.

    Attributes:
        rows: Rows on the host.
        series: What each is to hold.
        place: Room on the device for all of it, of one dimension: of that dtype, or of bytes.
    """

    rows: Sequence[Row]
    series: Sequence[Series]
    place: torch.Tensor

    @property
    def is_in_order(self) -> bool:
        """Whether none of the values has to be copied first."""
        return all(series.is_in_order for series in self.series)

    def parts(self) -> Iterable[tuple[list[torch.Tensor], torch.Tensor]]:
        """What torch is to concatenate, and where to. Some values may be copied for it."""
        if self.place.dtype == torch.uint8 or not self.is_in_order:
            flat = raw_bytes if self.place.dtype == torch.uint8 else torch.Tensor.flatten
            return [(list(map(flat, chain.from_iterable(series.values for series in self.series))), self.place)]
        return self._parts_in_order()

    def _parts_in_order(self) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
        pieces: list[torch.Tensor] = []
        start = end = 0
        for row, series in zip(self.rows, self.series, strict=True):
            values = iter(series.values)
            for block in row.blocks:
                begin, end = end, end + block.whole.numel()
                of_block = list(islice(values, len(block.keys)))
                if not _is_copied_as_it_is(block):
                    pieces += map(torch.Tensor.flatten, of_block)
                    continue
                if pieces:
                    yield pieces, self.place[start:begin]
                yield of_block, self.place[begin:end].view(block.whole.shape)
                pieces, start = [], end
        if pieces:
            yield pieces, self.place[start:end]


class Devices:
    """Copies weights on the device, where memory allows it, and from there to the host on a stream of its own.

    A copy on the device takes a twentieth of the time of one to the host, so that is what training waits for.

    Args:
        share: Share of the memory of a device that is free which the copies may take, until they are on the host.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def get_ready(self, device: torch.device, dtypes: Iterable[torch.dtype]) -> None:
        """Do on a device what takes long for the first time: make a stream, and load what copies values of dtypes."""
        with torch.cuda.stream(self._stream(device)):
            for dtype, part in product(set(map(_copied_as, dtypes)), _KINDS_OF_PIECES):
                pieces = torch.zeros(2, _ALIGNED, dtype=torch.uint8, device=device)[:, part].view(dtype)
                torch.cat(list(pieces), out=torch.zeros(pieces.numel(), dtype=dtype, device=device))
        self._stream(device).synchronize()

    def bring(
        self, device: torch.device, rows: Sequence[tuple[Row, Series]], singles: tuple[Values, Values]
    ) -> list[torch.cuda.Event]:
        """Begin to copy values from a device, as they are now on all of its streams.

        Args:
            device: Device that they are on.
            rows: Rows on the host, and the values for each.
            singles: Further rooms on the host, and the value for each.

        Returns:
            What to wait for, on any thread, before the rooms are read.
        """
        rooms, values = list(singles[0]), list(singles[1])
        with torch.cuda.device(device), torch.inference_mode():
            # All that can be done before the device is waited for, since it is idle from then on.
            clones, memory = self._clones(device, rows)
            parts = [list(clone.parts()) if clone.is_in_order else None for clone in clones]
            for row, series in rows[sum(len(clone.rows) for clone in clones) :]:
                rooms.extend(_split(row, series.values))
                values.extend(series.values)
            torch.cuda.synchronize()
            for clone, found in zip(clones, parts, strict=True):
                for pieces, place in clone.parts() if found is None else found:
                    torch.cat(pieces, out=place)
            if rooms:
                torch._foreach_copy_(rooms, values, non_blocking=True)  # see ADR 10
            copied = torch.cuda.current_stream().record_event()
            arrived = [] if memory is None else [self._send(device, clones, memory, copied)]
            copied.synchronize()
        return arrived

    def _clones(
        self, device: torch.device, rows: Sequence[tuple[Row, Series]]
    ) -> tuple[list[_Clone], torch.Tensor | None]:
        """Room on the device for the first rows, as many as there is memory for, and that memory."""
        room_left = int(self._share * _free_memory(device)) if rows and self._share else 0
        fitting: list[tuple[Row, Series]] = []
        for row, series in rows:
            room_left -= _aligned(row.whole.nbytes) + series.bytes_out_of_order
            if room_left < 0:
                break
            fitting.append((row, series))
        if not fitting:
            return [], None
        groups = _at_once(fitting)
        sizes = [sum(row.whole.nbytes for row, _ in group) for group in groups]
        starts = list(accumulate(map(_aligned, sizes), initial=0))
        try:
            memory = torch.empty(starts[-1], dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            return [], None
        return [
            _Clone(
                [row for row, _ in group],
                [series for _, series in group],
                memory[start : start + size].view(_copied_as(group[0][0].whole.dtype)),
            )
            for group, start, size in zip(groups, starts, sizes, strict=False)
        ], memory

    def _send(
        self, device: torch.device, clones: Sequence[_Clone], memory: torch.Tensor, copied: torch.cuda.Event
    ) -> torch.cuda.Event:
        stream = self._stream(device)
        arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # of torch
        with torch.cuda.stream(stream):
            stream.wait_event(copied)
            for clone in clones:
                wholes = [row.whole.view(clone.place.dtype) for row in clone.rows]
                places = torch.split(clone.place, [whole.numel() for whole in wholes])
                for whole, place in zip(wholes, places, strict=True):
                    whole.copy_(place, non_blocking=True)
            memory.record_stream(stream)  # it is free for training when it has arrived
            arrived.record(stream)
        return arrived

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # of torch
        return self._streams[device]


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    has_cuda: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # of torch
    return has_cuda and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def every_stream(devices: Iterable[str]) -> Iterator[None]:
    """Values that are copied in this block are those of this moment, whichever stream writes them.

    Args:
        devices: Types of the devices that the values are on.
    """
    is_cuda = "cuda" in devices
    if is_cuda:
        # What other streams are still writing belongs to the snapshot.
        torch.cuda.synchronize()
    yield
    if is_cuda:
        # What writes the weights from now on comes too late for it. (Copies to the host have a stream of their own.)
        torch.cuda.current_stream().synchronize()


def settled(value: torch.Tensor) -> torch.Tensor:
    """A value that no stream is writing any more."""
    if value.is_cuda:
        torch.cuda.synchronize(value.device)
    return value


def _free_memory(device: torch.device) -> int:
    """Bytes that neither training, as far as it went, nor anybody else uses."""
    free, total = torch.cuda.mem_get_info(device)
    if (fraction := torch.cuda.get_per_process_memory_fraction(device)) < 1.0:
        return max(0, min(free, int(fraction * total) - torch.cuda.memory_reserved(device)))
    return free


def _copied_as(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in _CONCATENATED else torch.uint8


def _is_copied_as_it_is(block: Block) -> bool:
    """Whether it is worth a call of its own: a view of each tensor takes time too, and this needs none.

    Values of whole words are copied by the same kernel as those of one dimension.
    """
    return block.is_one and block.has_words and block.whole.dim() <= _DIMENSIONS and len(block.keys) >= _MANY


def _at_once(rows: Sequence[tuple[Row, Series]]) -> list[list[tuple[Row, Series]]]:
    """Rows of one dtype together, as far as torch copies them by one kernel."""
    groups: list[list[tuple[Row, Series]]] = []
    latest: dict[torch.dtype, tuple[list[tuple[Row, Series]], int]] = {}
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


def _split(row: Row, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    pieces = torch.split(row.whole, [value.numel() for value in values])
    return [piece.view(value.shape) for piece, value in zip(pieces, values, strict=True)]

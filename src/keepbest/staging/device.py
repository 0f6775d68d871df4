"""From CUDA devices to the host, while training continues. **Rank-local**."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import torch

from keepbest.modules.raw_bytes import raw_bytes
from keepbest.staging.rooms import Row

_CONCATENATED = frozenset(
    (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
)  # dtypes that are copied as they are; others are as bytes
_INDEXED = (1 << 31) - 1  # values: torch concatenates more on a device one tensor after the other
_ALIGNED = 512  # bytes, as torch aligns what it allocates on a device

Values = Sequence[torch.Tensor]


class _Clone(NamedTuple):
    """Rows of one dtype on the device.

    Attributes:
        rows: Rows on the host.
        values: What they are to hold, one after the other.
        place: Room on the device for all of it, of one dimension.
    """

    rows: Sequence[Row]
    values: Values
    place: torch.Tensor

    @property
    def is_as_it_lies(self) -> bool:
        """Whether no value has to be copied to be in one row."""
        return _lie_in_order(self.values)

    def in_one_row(self) -> list[torch.Tensor]:
        """The values as torch can copy them, one after the other."""
        return _in_one_row(self.values, self.place)


class Devices:
    """Copies weights on the device, where memory allows it, and from there to the host on a stream of its own.

    A copy on the device takes a twentieth of the time of one to the host, so that is what training waits for.

    Args:
        share: Share of the memory of a device that is free which the copies may take, until they are on the host.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def get_ready(self, dtypes: Iterable[torch.dtype]) -> None:
        """Do on the current device what takes long for the first time: make a stream, and load what copies on it."""
        device = torch.device("cuda", torch.cuda.current_device())
        with torch.cuda.stream(self._stream(device)):
            for dtype in dtypes:
                two = torch.zeros(2, 8, dtype=torch.uint8, device=device).view(dtype)
                place = torch.empty(16, dtype=torch.uint8, device=device).view(dtype)
                torch.cat(_in_one_row(list(two), place), out=place)
        self._stream(device).synchronize()

    def bring(
        self, device: torch.device, rows: Sequence[tuple[Row, Values]], singles: tuple[Values, Values]
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
            pieces = [clone.in_one_row() if clone.is_as_it_lies else None for clone in clones]
            for row, found in rows[sum(len(clone.rows) for clone in clones) :]:
                rooms.extend(_split(row, found))
                values.extend(found)
            torch.cuda.synchronize()
            for clone, piece in zip(clones, pieces, strict=True):
                torch.cat(clone.in_one_row() if piece is None else piece, out=clone.place)
            if rooms:
                torch._foreach_copy_(rooms, values, non_blocking=True)  # see ADR 10
            copied = torch.cuda.current_stream().record_event()
            arrived = [] if memory is None else [self._send(device, clones, memory, copied)]
            copied.synchronize()
        return arrived

    def _clones(
        self, device: torch.device, rows: Sequence[tuple[Row, Values]]
    ) -> tuple[list[_Clone], torch.Tensor | None]:
        """Room on the device for the first rows, as many as there is memory for, and that memory."""
        room_left = int(self._share * _free_memory(device)) if rows and self._share else 0
        fitting: list[tuple[Row, Values]] = []
        for row, values in rows:
            room_left -= _aligned(row.whole.nbytes)
            if not _lie_in_order(values):
                room_left -= sum(value.nbytes for value in values if not _lie_in_order([value]))
            if room_left < 0:
                break
            fitting.append((row, values))
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
                list(chain.from_iterable(values for _, values in group)),
                memory[start : start + size].view(group[0][0].whole.dtype),
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
                places = torch.split(clone.place, [row.whole.numel() for row in clone.rows])
                for row, place in zip(clone.rows, places, strict=True):
                    row.whole.copy_(place, non_blocking=True)
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


def _in_one_row(values: Values, place: torch.Tensor) -> list[torch.Tensor]:
    """Values as torch can copy them, one after the other, into a place of their dtype.

    Those that are not contiguous are copied for it.
    """
    if place.dtype in _CONCATENATED:
        return list(map(torch.Tensor.flatten, values))
    return [raw_bytes(value).view(place.dtype) for value in values]


def _lie_in_order(values: Values) -> bool:
    """Whether no value has to be copied on the device to have its elements, as they are read, one after the other."""
    has_signs = any(map(torch.Tensor.is_conj, values)) or any(map(torch.Tensor.is_neg, values))
    return all(map(torch.Tensor.is_contiguous, values)) and not has_signs


def _at_once(rows: Sequence[tuple[Row, Values]]) -> list[list[tuple[Row, Values]]]:
    """Rows of one dtype together, as far as torch copies them by one kernel."""
    groups: list[list[tuple[Row, Values]]] = []
    latest: dict[torch.dtype, tuple[list[tuple[Row, Values]], int]] = {}
    for row, values in rows:
        group, count = latest.get(row.whole.dtype, ([], 0))
        if not group or count + row.whole.numel() > _INDEXED:
            group, count = [], 0
            groups.append(group)
        group.append((row, values))
        latest[row.whole.dtype] = group, count + row.whole.numel()
    return groups


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED


def _split(row: Row, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    pieces = torch.split(row.whole, [value.numel() for value in values])
    return [piece.view(value.shape) for piece, value in zip(pieces, values, strict=True)]

"""From CUDA devices to the host, while training continues. **Rank-local**."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, product
from typing import NamedTuple

import torch

from keepbest.modules.raw_bytes import raw_bytes
from keepbest.staging.rooms import Row

_CONCATENATED = frozenset(
    (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)
)  # dtypes that are copied as they are; others are as bytes
_INDEXED = (1 << 31) - 1  # bytes: torch concatenates so many values by one kernel, and more one tensor at a time
# torch has a kernel for pieces of whole 16 bytes, one for those that begin at such, and one for all others.
_KINDS_OF_PIECES = (slice(0, 512), slice(0, 8), slice(8, 16))
_ALIGNED = 512  # bytes, as torch aligns what it allocates on a device

Values = Sequence[torch.Tensor]


class _Filled(NamedTuple):
    """A row on the host, and what it is to hold.

    Attributes:
        row: Row on the host.
        values: Value of each of its rooms.
        is_in_order: Whether none has to be copied on the device to have its values, as they are read, side by side.
    """

    row: Row
    values: Values
    is_in_order: bool

    @property
    def nbytes(self) -> int:
        """Bytes on the device that it takes to clone it."""
        copied = () if self.is_in_order else (value for value in self.values if not _are_in_order([value]))
        return _aligned(self.row.whole.nbytes) + sum(value.nbytes for value in copied)


class _Clone(NamedTuple):
    """Rows of one dtype on the device.

    Attributes:
        rows: Rows on the host.
        values: What they are to hold, one after the other.
        place: Room on the device for all of it, of one dimension: of that dtype, or of bytes.
        is_in_order: Whether none of the values has to be copied first.
    """

    rows: Sequence[Row]
    values: Values
    place: torch.Tensor
    is_in_order: bool

    def in_one_row(self) -> list[torch.Tensor]:
        """The values as torch can copy them into the place, one after the other. Some may be copied for it."""
        return list(map(raw_bytes if self.place.dtype == torch.uint8 else torch.Tensor.flatten, self.values))


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
            pieces = [clone.in_one_row() if clone.is_in_order else None for clone in clones]
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
        fitting: list[_Filled] = []
        for row, values in rows:
            filled = _Filled(row, values, _are_in_order(values))
            room_left -= filled.nbytes
            if room_left < 0:
                break
            fitting.append(filled)
        if not fitting:
            return [], None
        groups = _at_once(fitting)
        sizes = [sum(filled.row.whole.nbytes for filled in group) for group in groups]
        starts = list(accumulate(map(_aligned, sizes), initial=0))
        try:
            memory = torch.empty(starts[-1], dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            return [], None
        return [
            _Clone(
                [filled.row for filled in group],
                list(chain.from_iterable(filled.values for filled in group)),
                memory[start : start + size].view(_copied_as(group[0].row.whole.dtype)),
                all(filled.is_in_order for filled in group),
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


def _are_in_order(values: Values) -> bool:
    """Whether no value has to be copied on the device to have its elements, as they are read, side by side."""
    has_signs = any(map(torch.Tensor.is_conj, values)) or any(map(torch.Tensor.is_neg, values))
    return all(map(torch.Tensor.is_contiguous, values)) and not has_signs


def _at_once(rows: Sequence[_Filled]) -> list[list[_Filled]]:
    """Rows of one dtype together, as far as torch copies them by one kernel."""
    groups: list[list[_Filled]] = []
    latest: dict[torch.dtype, tuple[list[_Filled], int]] = {}
    for filled in rows:
        whole = filled.row.whole
        group, count = latest.get(whole.dtype, ([], 0))
        if not group or count + whole.nbytes > _INDEXED:
            group, count = [], 0
            groups.append(group)
        group.append(filled)
        latest[whole.dtype] = group, count + whole.nbytes
    return groups


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED


def _split(row: Row, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    pieces = torch.split(row.whole, [value.numel() for value in values])
    return [piece.view(value.shape) for piece, value in zip(pieces, values, strict=True)]

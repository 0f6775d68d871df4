"""From CUDA devices to the host, while training continues. **Rank-local**."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch

from keepbest.modules.raw_bytes import raw_bytes
from keepbest.staging.rooms import Row

_CONCATENATED = frozenset(
    (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
)  # dtypes that are copied as they are; others are as bytes
_ALIGNED = 512  # bytes, as torch aligns what it allocates on a device

Values = Sequence[torch.Tensor]


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
        with torch.cuda.device(device):
            # All that can be done before the device is waited for, since it is idle from then on.
            places, memory = self._places(device, [row for row, _ in rows])
            cloned = [(found, place) for (_, found), place in zip(rows, places, strict=False)]
            pieces = [_in_one_row(*each) if all(map(torch.Tensor.is_contiguous, each[0])) else None for each in cloned]
            for row, found in rows[len(places) :]:
                rooms.extend(_split(row, found))
                values.extend(found)
            torch.cuda.synchronize()
            for (found, place), piece in zip(cloned, pieces, strict=True):
                torch.cat(_in_one_row(found, place) if piece is None else piece, out=place)
            if rooms:
                torch._foreach_copy_(rooms, values, non_blocking=True)  # see ADR 10
            copied = torch.cuda.current_stream().record_event()
            sent = [(row.whole, place) for (row, _), place in zip(rows, places, strict=False)]
            arrived = [] if memory is None else [self._send(device, sent, memory, copied)]
            copied.synchronize()
        return arrived

    def _places(self, device: torch.device, rows: Sequence[Row]) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """Room on the device for the first rows, as many as there is memory for, and that memory."""
        room_left = self._share * _free_memory(device) if rows and self._share else 0.0
        starts, end = list[int](), 0
        for row in rows:
            start, end = end, end + -(-row.whole.nbytes // _ALIGNED) * _ALIGNED
            if end > room_left:
                end = start
                break
            starts.append(start)
        if not starts:
            return [], None
        try:
            memory = torch.empty(end, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            return [], None
        places = zip(rows, starts, strict=False)
        return [memory[start : start + row.whole.nbytes].view(row.whole.dtype) for row, start in places], memory

    def _send(
        self,
        device: torch.device,
        sent: Sequence[tuple[torch.Tensor, torch.Tensor]],
        memory: torch.Tensor,
        copied: torch.cuda.Event,
    ) -> torch.cuda.Event:
        stream = self._stream(device)
        arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # of torch
        with torch.cuda.stream(stream):
            stream.wait_event(copied)
            for room, place in sent:
                room.copy_(place, non_blocking=True)
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
    limit = torch.cuda.get_per_process_memory_fraction(device) * total
    return max(0, min(free, int(limit) - torch.cuda.memory_reserved(device)))


def _in_one_row(values: Values, place: torch.Tensor) -> list[torch.Tensor]:
    """Values as torch can copy them, one after the other, into a place of their dtype.

    Those that are not contiguous are copied for it.
    """
    if place.dtype in _CONCATENATED:
        return [value.view(-1) if value.is_contiguous() else value.reshape(-1) for value in values]
    return [raw_bytes(value).view(place.dtype) for value in values]


def _split(row: Row, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    pieces = torch.split(row.whole, [value.numel() for value in values])
    return [piece.view(value.shape) for piece, value in zip(pieces, values, strict=True)]

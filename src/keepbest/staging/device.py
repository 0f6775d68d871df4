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


class Devices:
    """Copies weights on the device, where memory allows it, and from there to the host on a stream of its own.

    A copy on the device takes a twentieth of the time of one to the host, so that is what training waits for.

    Args:
        share: Share of the memory of a device that is free which the copies may take, until they are on the host.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def bring(
        self,
        device: torch.device,
        rows: Sequence[tuple[Row, Sequence[torch.Tensor]]],
        singles: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]],
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
            torch.cuda.synchronize()  # `every_stream` waits for the current device only
            clones: list[tuple[torch.Tensor, torch.Tensor]] = []
            room_left = self._share * _free_memory(device) if rows and self._share else 0.0
            for row, found in rows:
                clone = _clone(found) if row.whole.nbytes <= room_left else None
                room_left -= row.whole.nbytes
                if clone is None:
                    room_left = 0.0
                    rooms.extend(_split(row, found))
                    values.extend(found)
                else:
                    clones.append((row.whole, clone))
            if rooms:
                torch._foreach_copy_(rooms, values, non_blocking=True)  # see ADR 10
            copied = torch.cuda.current_stream().record_event()
            arrived = [self._send(device, clones, copied)] if clones else []
            copied.synchronize()
        return arrived

    def _send(
        self, device: torch.device, clones: Sequence[tuple[torch.Tensor, torch.Tensor]], copied: torch.cuda.Event
    ) -> torch.cuda.Event:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # of torch
        stream = self._streams[device]
        arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # of torch
        with torch.cuda.stream(stream):
            stream.wait_event(copied)
            for room, clone in clones:
                room.copy_(clone.view(room.dtype), non_blocking=True)
                clone.record_stream(stream)  # its memory is free for training when it has arrived
            arrived.record(stream)
        return arrived


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


def _free_memory(device: torch.device) -> int:
    """Bytes that neither training, as far as it went, nor anybody else uses."""
    free, total = torch.cuda.mem_get_info(device)
    limit = torch.cuda.get_per_process_memory_fraction(device) * total
    return max(0, min(free, int(limit) - torch.cuda.memory_reserved(device)))


def _clone(values: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The values one after the other; `None` if the device has no memory for them."""
    try:
        if values[0].dtype not in _CONCATENATED:
            values = [raw_bytes(value) for value in values]
        if len(values) == 1:
            return values[0].detach().clone(memory_format=torch.contiguous_format).view(-1)
        flattened: torch.Tensor = torch._utils._flatten_dense_tensors(values)  # type: ignore[no-untyped-call]  # noqa: SLF001  # see ADR 10
        return flattened
    except torch.OutOfMemoryError:
        return None


def _split(row: Row, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    pieces = torch.split(row.whole, [value.numel() for value in values])
    return [piece.view(value.shape) for piece, value in zip(pieces, values, strict=True)]

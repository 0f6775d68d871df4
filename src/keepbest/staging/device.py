"""From CUDA devices to the host, while training continues. **Rank-local**."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import product
from typing import NamedTuple

import torch

from keepbest.modules.device_memory import unless_full
from keepbest.modules.raw_bytes import copy_to_host
from keepbest.staging.batch import are_in_order
from keepbest.staging.clone import Clone, Copy, Filled, clones_in, copied_as, fitting, room_for
from keepbest.staging.rooms import Row

# torch has a kernel for pieces of whole 16 bytes, one for those that begin at such, and one for all others.
_KINDS_OF_PIECES = (slice(0, 512), slice(0, 8), slice(8, 16))

Values = Sequence[torch.Tensor]


class _Account(NamedTuple):
    """Bytes that torch has taken from a device, and given back, in all, and those that it has now."""

    taken: int
    given_back: int
    held: int

    def has_all_of(self, before: _Account) -> bool:
        """Whether torch has given nothing back since, as far as nobody had it count anew, which takes both to 0."""
        return self.given_back == before.given_back and self.taken >= before.taken


class _Held(NamedTuple):
    """Memory that torch keeps for the next copies.

    Attributes:
        nbytes: Number of bytes.
        account: What torch had taken from the device, and given back, until then.
    """

    nbytes: int
    account: _Account


class Devices:
    """Copies weights on the device, where memory allows it, and from there to the host.

    A copy on the device takes a twentieth of the time of one to the host, so that is what training waits for. All of it
    runs on a stream of its own. For that stream torch keeps the memory, so training cannot break it into pieces, and
    gives it back to the device before training would run out of memory.

    Args:
        share: Share of the memory of a device that is free which the copies may take.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._held: dict[torch.device, _Held] = {}

    def get_ready(self, device: torch.device, dtypes: Iterable[torch.dtype], sizes: Sequence[int]) -> None:
        """Do on a device what takes long for the first time.

        Args:
            device: The device.
            dtypes: What is to be copied there.
            sizes: Bytes of each row that is to hold it.
        """
        if not self._share:
            return
        with torch.cuda.stream(self._stream(device)):
            for dtype, part in product(set(map(copied_as, dtypes)), _KINDS_OF_PIECES):
                pieces = torch.zeros(2, 512, dtype=torch.uint8, device=device)[:, part].view(dtype)
                torch.cat(list(pieces), out=torch.zeros(pieces.numel(), dtype=dtype, device=device))
            self._take(device, sizes)
        self._stream(device).synchronize()

    def bring(
        self, device: torch.device, rows: Sequence[Filled], singles: tuple[Values, Values]
    ) -> list[torch.cuda.Event]:
        """Begin to copy values from a device, as they are now on all of its streams.

        Args:
            device: Device that they are on.
            rows: Rows on the host, and the values for each.
            singles: Further rooms on the host, and the value for each.

        Returns:
            What to wait for, on any thread, before the rooms are read.
        """
        rooms, values, stream = list(singles[0]), list(singles[1]), self._stream(device)
        of_training = torch.cuda.current_stream(device)
        with torch.cuda.device(device), torch.cuda.stream(stream), torch.inference_mode():
            # All that can be done before the device is waited for, since it is idle from then on.
            count, memory = self._take(device, [row.whole.nbytes for row, _ in rows])
            clones = [] if memory is None else clones_in(memory, rows[:count])
            copies = [copy for clone in clones for copy in clone.copies()]
            _add(rooms, values, rows[count:])
            torch.cuda.synchronize()
            try:
                if not _are_made(copies):
                    clones = []
                    _add(rooms, values, rows[:count])
                _copy_to_host(rooms, values, of_training)
                copied = stream.record_event()
                arrived = [_send(clones, stream)] if clones else []
                copied.synchronize()
            except BaseException:
                torch.cuda.synchronize()  # else values could still arrive when the rooms belong to others
                raise
        return arrived

    def _take(self, device: torch.device, sizes: Sequence[int]) -> tuple[int, torch.Tensor | None]:
        """How many of the first rows there is memory for on the device, and that memory."""
        if not (sizes and self._share):
            return 0, None
        account, held = _account_of(device), self._held.get(device)
        is_kept = held is not None and account is not None and account.has_all_of(held.account)
        kept = held.nbytes if held is not None and is_kept else 0
        # What is kept is nobody else's, and to ask for what is free takes time.
        free = 0 if kept >= room_for(sizes) else _free_memory(device, account)
        if count := fitting(sizes, max(kept, int(self._share * free))):
            wanted = room_for(sizes[:count])
            take = partial(torch.empty, wanted, dtype=torch.uint8, device=device)
            memory: torch.Tensor | None = unless_full(take, lambda: None)  # there may be no room for it in one piece
            if memory is not None:
                if account is not None:
                    self._held[device] = _Held(max(kept, wanted), account)
                return count, memory
        return 0, None

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        """Without copies on the device that of training, since training waits for all."""
        if self._share:
            found: torch.cuda.Stream | None = unless_full(partial(_stream_of, device), lambda: None)
            if found is not None:
                return found
            self._share = 0.0  # torch loses some of the device's memory at each try
        return torch.cuda.current_stream(device)


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """One for all keepers, since torch keeps memory for each stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # of torch


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


def _account_of(device: torch.device) -> _Account | None:
    """The account of torch. Allocators other than its own have none."""
    if torch.cuda.get_allocator_backend() != "native":
        return None
    reserved = torch.cuda.memory_stats_as_nested_dict(device)["reserved_bytes"]["all"]
    return _Account(reserved["allocated"], reserved["freed"], reserved["current"])


def _free_memory(device: torch.device, account: _Account | None) -> int:
    """Bytes that neither training, as far as it went, nor anybody else uses."""
    free, total = torch.cuda.mem_get_info(device)
    if account is not None and (fraction := torch.cuda.get_per_process_memory_fraction(device)) < 1.0:
        free = max(0, min(free, int(fraction * total) - account.held))
    return free


def _send(clones: Sequence[Clone], stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Begin to copy clones to the host, on the stream that made them. What has arrived is an event."""
    for clone in clones:
        for (row, _), part in zip(clone.rows, clone.parts(), strict=True):
            clone.on_host(row).copy_(part, non_blocking=True)
    arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # of torch
    arrived.record(stream)
    return arrived


def _copy_to_host(rooms: Values, values: Values, of_training: torch.cuda.Stream) -> None:
    """Copy values into rooms: those in order on the current stream, without waiting for them."""
    pairs = list(zip(rooms, values, strict=True))
    in_order = pairs if are_in_order(values) else [(room, value) for room, value in pairs if are_in_order([value])]
    if len(in_order) < len(pairs):
        with torch.cuda.stream(of_training):  # for which torch keeps memory to put the elements in order
            for room, value in pairs:
                if not are_in_order([value]):
                    copy_to_host(room, value)
    if in_order:
        torch._foreach_copy_(  # see ADR 10
            [room for room, _ in in_order], [value for _, value in in_order], non_blocking=True
        )


def _are_made(copies: Iterable[Copy]) -> bool:
    """Make copies on a device, if it has the memory for the code that does it, which CUDA loads when it is needed."""

    def make() -> bool:
        for copy in copies:
            copy.make()
        return True

    return unless_full(make, lambda: False)


def _add(rooms: list[torch.Tensor], values: list[torch.Tensor], rows: Sequence[Filled]) -> None:
    """Add what rows hold to rooms and values that are copied one by one."""
    for row, series in rows:
        rooms.extend(_split(row, series.values))
        values.extend(series.values)


def _split(row: Row, values: Values) -> list[torch.Tensor]:
    pieces = torch.split(row.whole, [value.numel() for value in values])
    return [piece.view(value.shape) for piece, value in zip(pieces, values, strict=True)]

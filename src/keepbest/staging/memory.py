"""Memory of the host, touched and pinned before it is needed. **Rank-local**."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]

_ALIGNMENT = 64  # bytes: a cache line
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


class Size(NamedTuple):
    """What is wanted.

    Attributes:
        nbytes: Number of bytes.
        is_pinned: Whether a CUDA device copies into it.
    """

    nbytes: int
    is_pinned: bool


def allocate(size: Size) -> Bytes:
    """Memory whose pages are there. Neither the GIL nor a device is held for long.

    Raises:
        MemoryError: If there is none.
        RuntimeError: If CUDA cannot pin it.
    """
    # From numpy, whose large arrays lie in huge pages where the system has them. It aligns them to 16 bytes alone, and
    # a copy to there takes a seventh longer.
    whole = np.empty(size.nbytes + _ALIGNMENT, dtype=np.uint8)
    start = -whole.ctypes.data % _ALIGNMENT
    memory = whole[start : start + size.nbytes]
    if size.nbytes:
        torch.from_numpy(memory).zero_()
    if size.is_pinned and size.nbytes:
        runtime, address = _runtime(), memory.ctypes.data
        torch.cuda.check_error(int(runtime.cudaHostRegister(address, size.nbytes, _PORTABLE)))
        weakref.finalize(memory, _unpin, os.getpid(), address).atexit = False
    return memory


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]  # of torch


def _unpin(process: int, address: int) -> None:
    if process == os.getpid():  # a forked child has no CUDA
        torch.cuda.check_error(int(_runtime().cudaHostUnregister(address)))


class Memory:
    """Allocates memory, some of it on a thread before it is asked for.

    The first snapshot of a run would take several times as long as the next ones if its pages had to be found then.
    """

    def __init__(self) -> None:
        self._ready: list[tuple[Size, Bytes]] = []
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    def prepare(self, sizes: Sequence[Size], get_ready: Callable[[], None] | None = None) -> None:
        """Begin to allocate these, which `take` hands out.

        Args:
            sizes: Sizes of what will be taken.
            get_ready: Function that the thread calls first.
        """
        self.end()
        self._is_over = threading.Event()
        device = torch.cuda.current_device() if any(size.is_pinned for size in sizes) else None
        arguments = (list(sizes), self._is_over, self._ready, device, get_ready)
        self._thread = threading.Thread(target=_prepare, args=arguments, name="keepbest-memory", daemon=True)
        # An interpreter that ends while the thread is in torch would abort.
        weakref.finalize(self, _end, self._is_over, weakref.ref(self._thread))
        self._thread.start()

    def take(self, sizes: Sequence[Size]) -> list[Bytes]:
        """Memory of these sizes: what is ready, and the rest now. What else was prepared is freed.

        Raises:
            MemoryError, RuntimeError: As `allocate`.
        """
        self.end()
        taken: list[Bytes] = []
        for size in sizes:
            place = next((place for place, (ready, _) in enumerate(self._ready) if ready == size), None)
            taken.append(allocate(size) if place is None else self._ready.pop(place)[1])
        self._ready.clear()
        return taken

    def end(self) -> None:
        """Prepare no more. What is being allocated is waited for."""
        self._is_over.set()
        if self._thread is not None and self._thread.ident is not None:  # else it could not be started
            self._thread.join()
        self._thread = None


def _end(is_over: threading.Event, thread: weakref.ref[threading.Thread]) -> None:
    is_over.set()
    running = thread()
    if running is not None and running.is_alive() and running is not threading.current_thread():
        running.join()


def _prepare(
    sizes: Sequence[Size],
    is_over: threading.Event,
    ready: list[tuple[Size, Bytes]],
    device: int | None,
    get_ready: Callable[[], None] | None,
) -> None:
    try:
        if device is not None:
            torch.cuda.set_device(device)  # of this thread
        if get_ready is not None:
            get_ready()
        for size in sizes:
            if is_over.is_set():
                return
            ready.append((size, allocate(size)))
    except (MemoryError, RuntimeError):
        return  # who needs it asks again, and raises it on every rank

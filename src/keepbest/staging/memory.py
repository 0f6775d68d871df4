"""Memory of the host, touched and pinned before it is needed. **Rank-local**."""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from keepbest.errors import ConfigError
from keepbest.user_code import Log
from keepbest.worker import Threaded

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device
_ALREADY_PINNED = 712  # cudaErrorHostMemoryAlreadyRegistered
# Of Linux. MADV_HUGEPAGE: a page takes as long to find, and to pin, however large it is. MADV_WIPEONFORK: no child has
# a use for this memory, and workers that load data are forked again and again. Each would get a copy at once of all
# that is pinned, and of the rest when the next snapshot is taken.
_ADVICE = (14, 18)

_logger = Log(__name__)


class Size(NamedTuple):
    """What is wanted.

    Attributes:
        nbytes: Number of bytes, more than none.
        is_pinned: Whether a CUDA device copies into it.
    """

    nbytes: int
    is_pinned: bool


class NotPinnedError(RuntimeError):
    """CUDA cannot pin memory."""


def allocate(size: Size) -> Bytes:
    """Memory whose pages are there, and which no child process has. Neither the GIL nor a device is held for long.

    Raises:
        MemoryError: If there is none.
        NotPinnedError: If CUDA cannot pin it.
    """
    try:
        pages = mmap.mmap(-1, size.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{size.nbytes} bytes: {error}") from error
    for advice in _ADVICE if sys.platform == "linux" else ():
        with contextlib.suppress(OSError):  # a kernel that does not know it
            pages.madvise(advice)
    memory = np.frombuffer(pages, dtype=np.uint8)
    torch.from_numpy(memory).zero_()
    if size.is_pinned:
        _pin(memory)
    return memory


def _pin(memory: Bytes) -> None:
    """Pin memory until it is freed. A thread of its own does it: CUDA reports a failure to its next kernel, too."""
    errors: list[BaseException] = []
    try:
        thread = Threaded("keepbest-pin")
    except ConfigError as error:
        raise NotPinnedError(str(error)) from error
    try:
        thread.submit(partial(_register, memory, torch.cuda.current_device()), errors.append)
    finally:
        thread.close(timeout=0)  # an interruption leaves no thread that waits for more
    thread.close()
    if errors:
        raise NotPinnedError(str(errors[0])) from errors[0]


def _register(memory: Bytes, device: int) -> None:
    torch.cuda.set_device(device)
    address = memory.ctypes.data
    code = int(_runtime().cudaHostRegister(address, memory.nbytes, _PORTABLE))
    if code == _ALREADY_PINNED:  # by what lay there before, if an interruption came while it was freed
        _runtime().cudaHostUnregister(address)
        code = int(_runtime().cudaHostRegister(address, memory.nbytes, _PORTABLE))
    if code:
        raise NotPinnedError(f"{memory.nbytes} bytes: CUDA error {code}")
    # Here, since who waits for this thread may be interrupted.
    weakref.finalize(memory, _unpin, os.getpid(), device, address).atexit = False


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]  # of torch


def _unpin(process: int, device: int, address: int) -> None:
    if process == os.getpid():  # a forked child has no CUDA
        with torch.cuda.device(device):  # else CUDA may make a context on the first device for this thread
            torch.cuda.check_error(int(_runtime().cudaHostUnregister(address)))


class _Source:
    """Allocates memory, and pins it as far as CUDA can."""

    def __init__(self) -> None:
        self._can_pin = True

    def allocate(self, size: Size) -> Bytes:
        if size.is_pinned and self._can_pin:
            try:
                return allocate(size)
            except NotPinnedError as error:
                self._can_pin = False
                _logger.warning(
                    "the memory of the host for snapshots is not pinned, so a new best holds up training for longer: "
                    "%s. Look at the limit of locked memory (ulimit -l) of this process and of its container",
                    error,
                )
        return allocate(size._replace(is_pinned=False))


class Memory:
    """Allocates memory, some of it on a thread before it is asked for.

    The first snapshot of a run would take several times as long as the next ones if its pages had to be found then.
    """

    def __init__(self) -> None:
        self._source = _Source()
        self._ready: list[tuple[Size, Bytes]] = []
        self._stop = _Stop()
        self._thread: Threaded | None = None

    def prepare(
        self,
        sizes: Sequence[Size],
        get_ready: Sequence[Callable[[], None]] = (),
        use: Callable[[], None] | None = None,
    ) -> None:
        """Begin to allocate these, which `take` hands out.

        Args:
            sizes: Sizes of what will be taken.
            get_ready: Functions that the thread calls first.
            use: Function that the thread calls when all of it is there, and which may take it.

        Raises:
            ConfigError: If no thread can be started.
        """
        self.end()
        self._stop = _Stop()
        device = torch.cuda.current_device() if any(size.is_pinned for size in sizes) else None
        work = _Work(list(sizes), device, get_ready, use)
        self._thread = thread = Threaded("keepbest-memory")
        try:
            # An interpreter that ends while the thread is in torch would abort.
            thread.end_before_exit(self._stop.set)
            # Nothing waits here: garbage is also collected on threads that this one waits for.
            weakref.finalize(self, self._stop.set).atexit = False
            thread.submit(partial(_prepare, self._source, work, self._ready, self._stop), _report)
        finally:
            thread.close(timeout=0)  # it ends when that is done

    def take(self, sizes: Sequence[Size]) -> list[Bytes]:
        """Memory of these sizes: what is ready, and the rest now. What else was prepared is freed.

        Raises:
            MemoryError: As `allocate`.
        """
        self.end()
        taken: list[Bytes] = []
        for size in sizes:
            place = next((place for place, (ready, _) in enumerate(self._ready) if ready == size), None)
            taken.append(self._source.allocate(size) if place is None else self._ready.pop(place)[1])
        self._ready.clear()
        return taken

    def end(self) -> None:
        """Prepare no more. What is being allocated is waited for."""
        self._stop.set()
        if self._thread is not None:
            self._thread.close()


class _Stop:
    """Ends what another thread does. It has no lock, since an interruption could leave that taken."""

    is_set = False

    def set(self) -> None:
        self.is_set = True


def _report(error: BaseException) -> None:
    _logger.error("memory for the first snapshot could not be prepared", exc_info=error)


class _Work(NamedTuple):
    """What a thread prepares: see `Memory.prepare`."""

    sizes: list[Size]
    device: int | None
    get_ready: Sequence[Callable[[], None]]
    use: Callable[[], None] | None


def _prepare(source: _Source, work: _Work, ready: list[tuple[Size, Bytes]], stop: _Stop) -> None:
    # Who needs what cannot be had asks again, and raises it on every rank.
    with contextlib.suppress(RuntimeError):
        if work.device is not None:
            torch.cuda.set_device(work.device)  # of this thread
        for get_ready in work.get_ready:
            get_ready()
    with contextlib.suppress(MemoryError, RuntimeError):
        for size in work.sizes:
            if stop.is_set:
                return
            ready.append((size, source.allocate(size)))
        if work.use is not None and not stop.is_set:
            work.use()

"""Buffers on rank 0 that hold a snapshot while it is written, so that training goes on meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

_BUFFERS = 2  # while one is being written, the other can take the next best


class StagingBuffer:
    """Full CPU tensors, allocated when they are first needed and then filled again and again.

    They are pinned where the model is on a CUDA device, so that copies into them need not be waited for: `wait` does.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        self._copies: list[torch.cuda.Event] = []

    def tensor(self, key: str, like: torch.Tensor) -> torch.Tensor:
        """The CPU tensor for `key`, of the (global) shape and dtype of `like`; what it held before is given up."""
        held = self._tensors.get(key)
        if held is None or held.shape != like.shape or held.dtype != like.dtype:
            pinned = like.device.type == "cuda"
            held = torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=pinned)
            self._tensors[key] = held
        return held

    def fill(self, key: str, value: torch.Tensor) -> torch.Tensor:
        """Copy a full tensor into the buffer; from a CUDA device without waiting for it."""
        held = self.tensor(key, value)
        held.copy_(value, non_blocking=held.is_pinned() if value.is_cuda else False)
        if value.is_cuda:
            self._copies.append(torch.cuda.current_stream(value.device).record_event())
        return held

    def wait(self) -> None:
        """Wait until all copies have arrived; on the thread that reads the buffer."""
        for event in self._copies:
            event.synchronize()
        self._copies.clear()


class Staging:
    """Two buffers, claimed in turn. **Rank-local**, on rank 0.

    Args:
        make_room: is asked, when both are taken, whether a buffer that is only queued can be had; gives it, or `None`.
    """

    def __init__(self, make_room: Callable[[], StagingBuffer | None]) -> None:
        self._make_room = make_room
        self._free = [StagingBuffer() for _ in range(_BUFFERS)]
        self._released = threading.Condition()

    def claim(self) -> StagingBuffer:
        """A buffer to fill; waits for one to be released where there is none."""
        with self._released:
            if self._free:
                return self._free.pop()
        if (buffer := self._make_room()) is not None:
            return buffer
        with self._released:
            self._released.wait_for(lambda: self._free)
            return self._free.pop()

    def release(self, buffer: StagingBuffer) -> None:
        """Give back a buffer that was claimed; from any thread."""
        with self._released:
            self._free.append(buffer)
            self._released.notify_all()

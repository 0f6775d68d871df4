"""Buffers on the host that hold a snapshot while a thread writes it, so that training continues meanwhile."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue

import torch

from keepbest.modules.kinds import is_dense
from keepbest.staging.slot import Like, Slot

_SLOTS = 2  # while one is being written, the other can hold the next best
_PATIENCE = 1.0  # seconds to wait for a slot, before garbage is collected that may hold one


class HostSlot:
    """CPU tensors that are allocated when they are first needed, then filled again and again: a `Slot`.

    They are pinned where the model is on a CUDA device, so that a copy into them does not hold up training.

    Args:
        tensors: Tensors of earlier snapshots, by key, which this one fills again.
        release: Function that gets them back, once: when this slot is released, or when it is garbage, as after an
            interruption.
    """

    is_live = False

    def __init__(self, tensors: dict[str, torch.Tensor], release: Callable[[dict[str, torch.Tensor]], None]) -> None:
        self._tensors = tensors
        self._release = weakref.finalize(self, release, tensors)
        self._release.atexit = False
        self._copies: list[torch.cuda.Event] = []
        self._needed: set[str] = set()

    def reserve(self, key: str, like: Like) -> None:
        self.room(key, like)

    def room(self, key: str, like: Like) -> torch.Tensor:
        self._needed.add(key)
        held = self._tensors.get(key)
        if held is None or held.shape != torch.Size(like.shape) or held.dtype != like.dtype:
            self._tensors.pop(key, None)  # what is no longer needed makes room first
            held = torch.empty(tuple(like.shape), dtype=like.dtype, device="cpu", pin_memory=like.device == "cuda")
            self._tensors[key] = held
        return held

    def put(self, key: str, value: torch.Tensor) -> torch.Tensor:
        if not is_dense(value):
            return value.detach().to("cpu", copy=True)
        held = self.room(key, Like(value.shape, value.dtype, value.device.type))
        held.copy_(value, non_blocking=value.is_cuda and held.is_pinned())
        if value.is_cuda:
            self._copies.append(torch.cuda.current_stream(value.device).record_event())
        return held

    def copy(self, key: str, value: torch.Tensor) -> torch.Tensor:
        return self.put(key, value)

    def wait(self) -> None:
        for event in self._copies:
            event.synchronize()
        self._copies.clear()

    def release(self) -> None:
        if self._release.alive:
            for key in self._tensors.keys() - self._needed:
                del self._tensors[key]  # of weights that went, or lie among the ranks in another way now
        self._release()


class HostStaging:
    """Two slots, claimed in turn: a `Staging`. **Rank-local**, on rank 0.

    Args:
        make_room: Function that is called when both slots are taken. It gives up a save that is only queued, if it can,
            and returns the slot of that save.
    """

    waits = True

    def __init__(self, make_room: Callable[[], Slot | None]) -> None:
        self._make_room = make_room
        # What was used last is used first, so that saves which do not overlap need one buffer.
        self._free: list[dict[str, torch.Tensor]] = []
        # One entry for each of them. A queue of C, since an interruption can leave the lock of a condition taken.
        self._released: SimpleQueue[None] = SimpleQueue()
        self._claimed: weakref.WeakSet[HostSlot] = weakref.WeakSet()
        self._is_closed = False
        for _ in range(_SLOTS):
            self._take_back({})

    def claim(self) -> Slot:
        """A slot to fill; waits for one to be released where there is none."""
        try:
            self._released.get_nowait()
        except Empty:
            pass
        else:
            return self._claim()
        if (slot := self._make_room()) is not None:
            return slot
        while True:
            try:
                self._released.get(timeout=_PATIENCE)
            except Empty:
                gc.collect()
                # An interruption may have cost one.
                if self._released.empty() and len(self._claimed) < _SLOTS:
                    return self._claim()
            else:
                return self._claim()

    def close(self) -> None:
        """Free the slots, now or when they are released."""
        self._is_closed = True
        self._free.clear()

    def _claim(self) -> Slot:
        slot = HostSlot(self._free.pop() if self._free else {}, self._take_back)
        self._claimed.add(slot)
        return slot

    def _take_back(self, tensors: dict[str, torch.Tensor]) -> None:
        if not self._is_closed:
            self._free.append(tensors)
            self._released.put(None)

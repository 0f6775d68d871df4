"""Buffers on the host that hold a snapshot while a thread writes it, so that training continues meanwhile."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from queue import Empty, SimpleQueue

import torch

from keepbest.modules.kinds import PLAIN_CLASSES, is_dense
from keepbest.modules.raw_bytes import copy_to_host, signed
from keepbest.staging.batch import Batch
from keepbest.staging.copies import Copies
from keepbest.staging.device import Devices, settled
from keepbest.staging.memory import Memory
from keepbest.staging.rooms import Rooms, sizes_of
from keepbest.staging.slot import Like, Needs, Slot

_SLOTS = 2  # while one is being written, the other can hold the next best
_PATIENCE = 1.0  # seconds to wait for a slot, before garbage is collected that may hold one


class HostSlot:
    """Rooms that are allocated when they are first needed, then filled again and again: a `Slot`.

    They are pinned where the model is on a CUDA device, so that a copy into them does not hold up training.

    Args:
        rooms: Rooms of earlier snapshots, which this one fills again.
        devices: Way from CUDA devices.
        release: Function that gets the rooms back, once: when this slot is released, or when it is garbage, as after an
            interruption.
    """

    is_live = False

    def __init__(self, rooms: Rooms, devices: Devices, release: Callable[[Rooms], None]) -> None:
        self._rooms = rooms
        self._release = weakref.finalize(self, release, rooms)
        self._release.atexit = False
        self._copies = Copies(devices)
        self._needed: set[str] = set()
        self._reserved: list[Mapping[str, Like]] = []

    def reserve(self, wanted: Mapping[str, Like]) -> None:
        self._copies.wait()  # those of a save that was given up, which may land after the next ones
        self._reserved.append(wanted)  # to go through thousands takes time, which `release` has
        self._rooms.make(wanted)

    def room(self, key: str, like: Like) -> torch.Tensor:
        self._needed.add(key)
        return self._rooms.get(key, like)

    def put(self, key: str, value: torch.Tensor) -> torch.Tensor:
        if type(value) not in PLAIN_CLASSES:
            return self.copy(key, settled(value))
        if not is_dense(value):
            return signed(value).to("cpu", copy=True)
        room = self.room(key, Like(value.shape, value.dtype, value.device.type))
        self._copies.add(key, room, value)
        return room

    def put_all(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        if not batch.is_plain:
            return {key: self.put(key, value) for key, value in batch.values.items()}
        self._copies.add_all(self._rooms.made, batch)
        return self._rooms.made

    def copy(self, key: str, value: torch.Tensor) -> torch.Tensor:
        if not is_dense(value):
            return signed(value).to("cpu", copy=True)
        room = self.room(key, Like(value.shape, value.dtype, value.device.type))
        copy_to_host(room, value)
        return room

    def seal(self) -> None:
        self._copies.begin(self._rooms.rows)

    def wait(self) -> None:
        self._copies.wait()

    def release(self) -> None:
        if self._release.alive:
            self._copies.wait()
            # Others are of weights that went, or lie among the ranks in another way now.
            self._rooms.keep(self._needed.union(*self._reserved))
        self._release()


class HostStaging:
    """Two slots, claimed in turn: a `Staging`. **Rank-local**, on rank 0.

    Args:
        make_room: Function that is called when both slots are taken. It gives up a save that is only queued, if it can,
            and returns the slot of that save.
        device_share: Share of the free memory of a CUDA device that copies of the weights may take for a moment.
    """

    waits = True

    def __init__(self, make_room: Callable[[], Slot | None], *, device_share: float = 0.0) -> None:
        self._make_room = make_room
        self._devices = Devices(device_share)
        self._memory = Memory()
        # What was used last is used first, so that saves which do not overlap need one buffer.
        self._free: list[Rooms] = []
        # One entry for each of them. A queue of C, since an interruption can leave the lock of a condition taken.
        self._released: SimpleQueue[None] = SimpleQueue()
        self._claimed: weakref.WeakSet[HostSlot] = weakref.WeakSet()
        self._is_closed = False
        for _ in range(_SLOTS):
            self._take_back(Rooms(self._memory))

    def prepare(self, needs: Needs) -> None:
        dtypes = {like.dtype for like in needs.rooms.values()}
        devices, sizes = [device for device in needs.devices if device.type == "cuda"], sizes_of(needs.rooms)
        # What comes from several devices lies in rows together, which are not copied on any of them.
        rows = [size.nbytes for size in sizes if size.is_pinned] if len(devices) == 1 else []
        get_ready = [partial(self._devices.get_ready, device, dtypes, rows) for device in devices]
        self._memory.prepare(sizes, get_ready, self._free[-1].make_later(needs.rooms) if needs.is_sure else None)

    def claim(self) -> Slot:
        """A slot to fill; waits for one to be released where there is none."""
        self._memory.end()  # what is prepared for the first one
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
        self._memory.end()
        self._free.clear()

    def _claim(self) -> Slot:
        rooms = self._free.pop() if self._free else Rooms(self._memory)
        slot = HostSlot(rooms, self._devices, self._take_back)
        self._claimed.add(slot)
        return slot

    def _take_back(self, rooms: Rooms) -> None:
        if not self._is_closed:
            self._free.append(rooms)
            self._released.put(None)

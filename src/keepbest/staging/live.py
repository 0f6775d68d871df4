"""Slots of saves that training waits for."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from keepbest.modules.kinds import PLAIN_CLASSES, is_dense
from keepbest.modules.raw_bytes import copy_to_host, signed
from keepbest.staging.batch import Batch
from keepbest.staging.copies import Copies
from keepbest.staging.device import Devices, settled
from keepbest.staging.memory import Memory
from keepbest.staging.rooms import Rooms, sizes_of
from keepbest.staging.slot import Like, Needs


class LiveSlot:
    """Weights on the CPU are written from where they are, before training continues: a `Slot`.

    Others get room of their own. That of weights on CUDA devices is pinned, and used again by the next save.

    Args:
        pinned: Room for weights on CUDA devices.
    """

    is_live = True

    def __init__(self, pinned: Rooms | None = None) -> None:
        self._rooms: dict[str, torch.Tensor] = {}
        self._pinned = pinned or Rooms(Memory())
        self._copies = Copies(Devices(share=0.0))  # training waits for the host anyway

    def reserve(self, wanted: Mapping[str, Like]) -> None:
        pinned = _on_cuda(wanted)
        self._pinned.keep(set(pinned))
        self._pinned.make(pinned)
        for key, like in wanted.items():
            if key not in pinned and not (like.is_live and like.device == "cpu"):
                self._rooms[key] = like.empty()

    def put(self, key: str, value: torch.Tensor) -> torch.Tensor:
        if value.is_cuda and type(value) in PLAIN_CLASSES and is_dense(value):
            room = self._pinned.get(key, Like(value.shape, value.dtype, "cuda"))
            self._copies.add(key, room, value)
            return room
        reserved = self._reserved(key, settled(value))
        if reserved is None:
            return signed(value).cpu()
        copy_to_host(reserved, value)
        return reserved

    def put_all(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {key: self.put(key, value) for key, value in batch.values.items()}

    def copy(self, key: str, value: torch.Tensor) -> torch.Tensor:
        room = self._reserved(key, value)
        if room is None:
            return signed(value).to("cpu", copy=True)
        copy_to_host(room, value)
        return room

    def room(self, key: str, like: Like) -> torch.Tensor:
        if like.device == "cuda":
            return self._pinned.get(key, like)
        room = self._rooms.pop(key, None)
        return like.empty() if room is None else room

    def seal(self) -> None:
        self._copies.begin(self._pinned.rows)

    def wait(self) -> None:
        self._copies.wait()

    def release(self) -> None:
        self._rooms.clear()

    def _reserved(self, key: str, value: torch.Tensor) -> torch.Tensor | None:
        if value.is_cuda and is_dense(value):
            return self._pinned.get(key, Like(value.shape, value.dtype, "cuda"))
        room = self._rooms.pop(key, None)
        fits = room is not None and (room.shape, room.dtype) == (value.shape, value.dtype) and is_dense(value)
        return room if fits else None


class Unstaged:
    """For saves that are waited for: every slot is a `LiveSlot`. A `Staging`."""

    waits = False

    def __init__(self) -> None:
        self._memory = Memory()
        self._pinned = Rooms(self._memory)

    def prepare(self, needs: Needs) -> None:
        if pinned := _on_cuda(needs.rooms):
            self._memory.prepare(sizes_of(pinned), use=self._pinned.make_later(pinned) if needs.is_sure else None)

    def claim(self) -> LiveSlot:
        self._memory.end()  # what is prepared for the first one
        return LiveSlot(self._pinned)

    def close(self) -> None:
        self._memory.end()
        self._pinned = Rooms(self._memory)


def _on_cuda(wanted: Mapping[str, Like]) -> dict[str, Like]:
    return {key: like for key, like in wanted.items() if like.device == "cuda"}

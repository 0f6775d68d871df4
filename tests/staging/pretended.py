"""A device of CUDA that there is not, and what arrives from it."""

from __future__ import annotations

import torch

from keepbest.staging.batch import Series
from keepbest.staging.memory import Memory
from keepbest.staging.rooms import Rooms
from tests.staging.test_copies import rooms_for

CPU = torch.device("cpu")
GIB = 1 << 30


class Pretended:
    """A device that does at once what it is given, and writes down in which order that was.

    Attributes:
        free: Bytes that are free on it.
        fraction: Share of its memory that the process may have.
        reserved: Bytes that the process has.
        allocated: Bytes that the process took for training, in all.
        given_back: Bytes that the process had, and no longer has.
        backend: How torch allocates its memory.
        is_fragmented: Whether there is no room in one piece, however much is free.
        values: Values on it that `copies` copies to the host.
        interruption: What ends the wait for a clone, if anything does.
        log: What was done.
        taken: Bytes that were allocated on it.
        unfinished: Functions that write what its streams have not written yet, until they are waited for.
    """

    def __init__(self):
        self.free, self.fraction, self.reserved, self.given_back, self.is_fragmented = GIB, 1.0, 0, 0, False
        self.backend, self.values, self.interruption, self.allocated = "native", [], None, 0
        self.log, self.taken, self.unfinished = [], [], []

    def empty(self, size, *, dtype, device=None):
        if device is CPU:  # rooms on the host are made on "cpu"
            if self.is_fragmented:
                raise torch.OutOfMemoryError
            self.taken.append(size)
        return torch.zeros(size, dtype=dtype)


class Event:
    device = CPU

    def __init__(self, pretended, name):
        self.pretended, self.name = pretended, name

    def record(self, _stream):
        self.pretended.log.append(f"record {self.name}")

    def synchronize(self):
        if self.pretended.interruption is not None:
            raise self.pretended.interruption
        self.pretended.log.append(f"wait for {self.name}")


class Stream:
    def __init__(self, pretended):
        self.pretended = pretended

    def record_event(self):
        return Event(self.pretended, "copied")

    def synchronize(self):
        pass


def brought(devices, values, wanted=None):
    """What arrives of `values`, and the rows."""
    rooms = Rooms(Memory())
    rooms.make(wanted or rooms_for(values))
    rows = [row for row in rooms.rows if all(key in values for key in row.keys)]
    singles = [key for key in values if not any(key in row.keys for row in rows)]
    events = devices.bring(
        CPU,
        [(row, Series([values[key] for key in row.keys])) for row in rows],
        ([rooms.made[key] for key in singles], [values[key] for key in singles]),
    )
    return {key: rooms.made[key] for key in values}, rows, events


def bytes_of(rows):
    return sum(-(-row.whole.nbytes // 512) * 512 for row in rows)

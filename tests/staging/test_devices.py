"""The way from a device, with the CPU in its place: what is copied where, in which order, and with how much memory.

What only a device can show is in `tests/cuda`: that streams are waited for, that memory is pinned, and what it costs.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

from keepbest.staging.batch import Series
from keepbest.staging.device import Devices, _stream_of
from keepbest.staging.memory import Memory
from keepbest.staging.rooms import Rooms, sizes_of
from tests.staging.test_copies import differing, expected_of, of_all_kinds, rooms_for

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


@pytest.fixture
def device(monkeypatch):
    """There is no GPU here, so the calls of `torch.cuda` are answered by an object that writes them down."""
    pretended = Pretended()

    def synchronize():
        pretended.log.append("wait for all streams")
        for write in pretended.unfinished:
            write()

    def concatenate(pieces, *, out):
        pretended.log.append("clone")
        return cat(pieces, out=out)

    def only_native(answer):
        def ask(device):
            if pretended.backend != "native":
                raise RuntimeError(f"{pretended.backend} does not yet support this")
            return answer(device)

        return ask

    cat = torch.cat
    for name, replacement in {
        "device": lambda _: contextlib.nullcontext(),
        "stream": lambda _: contextlib.nullcontext(),
        "Stream": lambda _: Stream(pretended),
        "current_stream": lambda _: Stream(pretended),
        "current_device": lambda: 0,
        "Event": lambda **_: Event(pretended, "arrived"),
        "synchronize": synchronize,
        "mem_get_info": lambda _: (pretended.free, GIB),
        "get_allocator_backend": lambda: pretended.backend,
        "get_per_process_memory_fraction": only_native(lambda _: pretended.fraction),
        "memory_stats_as_nested_dict": only_native(
            lambda _: {
                "reserved_bytes": {
                    "all": {
                        "current": pretended.reserved,
                        "allocated": pretended.allocated + sum(pretended.taken),
                        "freed": pretended.given_back,
                    }
                }
            }
        ),
    }.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    monkeypatch.setattr(torch, "empty", pretended.empty)
    monkeypatch.setattr(torch, "cat", concatenate)
    _stream_of.cache_clear()
    yield pretended
    _stream_of.cache_clear()


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


def test_all_kinds_of_tensors_through_a_clone(device):
    values = of_all_kinds()
    expected = expected_of(values)
    found, rows, events = brought(Devices(share=0.5), values)
    assert differing(found, values, expected) == []
    assert sum(device.taken) <= bytes_of(rows)
    assert len(device.taken) == 1  # one piece, which goes back as a whole
    assert len(events) == 1


def many_of_all_kinds():
    values = {f"{key} {number}": value for number in range(40) for key, value in of_all_kinds().items()}
    values |= {
        f"{dimensions} dimensions {number}": torch.rand(number, *[2] * dimensions)
        for dimensions in range(6)
        for number in range(40)
    }
    return {key: value for key, value in values.items() if value.is_contiguous() and not value.is_neg()}


@pytest.mark.parametrize("row", [1 << 26, 5000])
def test_many_tensors_through_clones(device, monkeypatch, row):
    monkeypatch.setattr("keepbest.staging.rooms._ROW", row)
    values = many_of_all_kinds()
    expected = expected_of(values)
    found, rows, _ = brought(Devices(share=0.5), values)
    assert differing(found, values, expected) == []
    assert sum(device.taken) <= bytes_of(rows)


def test_many_tensors_need_no_view_of_each(device, monkeypatch):
    values = {str(number): torch.rand(number + 1, 4) for number in range(40)}
    expected = expected_of(values)
    flattened = []
    monkeypatch.setattr(torch.Tensor, "flatten", flattened.append)
    found, _, _ = brought(Devices(share=0.5), values)
    assert differing(found, values, expected) == []
    assert not flattened


def test_order_of_waiting_and_copying(device):
    _, _, (event,) = brought(Devices(share=0.5), {"a": torch.ones(3), "b": torch.ones(2, 2)})
    assert device.log == [
        "wait for all streams",  # they may still write the weights
        "clone",
        "record arrived",
        "wait for copied",  # else another stream could change the weights before
    ]
    assert event.name == "arrived"


@pytest.mark.parametrize(
    ("setting", "value"), [("free", 0), ("is_fragmented", True), ("fraction", 0.0), ("reserved", GIB)]
)
def test_no_memory_for_a_clone(device, setting, value):
    setattr(device, setting, value)
    if setting == "reserved":
        device.fraction = 0.9
    values = of_all_kinds()
    expected = expected_of(values)
    found, _, events = brought(Devices(share=0.5), values)
    assert differing(found, values, expected) == []
    assert not events  # all has arrived
    assert "clone" not in device.log
    assert not device.taken


def test_interruption_leaves_nothing_on_its_way(device):
    device.interruption = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        brought(Devices(share=0.5), {"a": torch.ones(3)})
    assert device.log[-1] == "wait for all streams"


def test_share_of_zero_asks_for_no_memory(device):
    values = of_all_kinds()
    expected = expected_of(values)
    found, _, events = brought(Devices(share=0.0), values)
    assert differing(found, values, expected) == []
    assert (events, device.taken) == ([], [])


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.3, 0.7, 1.0])
def test_memory_for_some_of_the_rows(device, share):
    values = of_all_kinds()
    expected = expected_of(values)
    _, rows, _ = brought(Devices(share=0.0), values)
    device.free = bytes_of(rows)
    found, _, events = brought(Devices(share=share), values)
    assert differing(found, values, expected) == []
    assert sum(device.taken) <= share * device.free
    assert bool(events) == bool(device.taken)
    if share == 1.0:
        assert sum(device.taken) > 0.9 * device.free


def test_rows_of_which_some_values_do_not_come(device):
    values = of_all_kinds()
    some = {key: value for number, (key, value) in enumerate(values.items()) if number % 3}
    expected = expected_of(some)
    found, _, _ = brought(Devices(share=0.5), some, rooms_for(values))
    assert differing(found, some, expected) == []
    assert device.log[0] == "wait for all streams"


def test_several_rows_of_one_dtype_are_cloned_at_once(device, monkeypatch):
    monkeypatch.setattr("keepbest.staging.rooms._ROW", 100)  # what is really the size of a row takes long
    values = {str(number): torch.full((10,), number, dtype=torch.uint8) for number in range(15)}
    expected = expected_of(values)
    found, rows, _ = brought(Devices(share=0.5), values)
    assert len(rows) > 1
    assert device.log.count("clone") == 1
    assert differing(found, values, expected) == []


def test_clones_end_where_torch_could_not_copy_at_once(device, monkeypatch):
    monkeypatch.setattr("keepbest.staging.clone._INDEXED", 40_000)  # what is really the limit takes gigabytes
    values = of_all_kinds() | {f"half of a row {number}": torch.arange(15_000.0) for number in range(6)}
    monkeypatch.setattr("keepbest.staging.rooms._ROW", 120_000)
    expected = expected_of(values)
    found, _, _ = brought(Devices(share=0.5), values)
    assert differing(found, values, expected) == []
    dtypes = len({value.dtype for value in values.values()})
    assert device.log.count("clone") > dtypes
    assert len(device.taken) == 1


def test_first_use_loads_what_copies_pieces_of_every_kind(device):
    dtypes = {value.dtype for value in of_all_kinds().values()} | {torch.complex128}
    Devices(share=0.5).get_ready(CPU, dtypes, [])
    assert device.log.count("clone") % 3 == 0  # whole words, words at the start alone, and others
    assert device.log.count("clone") >= 3 * len({dtype.itemsize for dtype in dtypes if not dtype.is_complex})


def test_memory_for_the_first_clone_is_taken_beforehand(device):
    values, devices = of_all_kinds(), Devices(share=0.5)
    expected = expected_of(values)
    devices.get_ready(CPU, {torch.float32}, [size.nbytes for size in sizes_of(rooms_for(values))])
    (prepared,) = device.taken
    device.free -= prepared
    found, _, _ = brought(devices, values)
    assert differing(found, values, expected) == []
    assert device.taken[1] <= prepared  # which torch takes from what it has kept


def test_memory_that_torch_keeps_counts_for_the_next_clone(device):
    values, devices = of_all_kinds(), Devices(share=0.5)
    brought(devices, values)
    device.free = device.taken[0]  # half of it and of what is kept is as much again
    for _ in range(3):
        brought(devices, values)
    assert device.taken == [device.taken[0]] * 4


def test_memory_that_training_needed_counts_no_more(device):
    values, devices = of_all_kinds(), Devices(share=0.5)
    brought(devices, values)
    device.free, device.given_back = device.taken[0], device.taken[0]
    brought(devices, values)
    assert sum(device.taken[1:]) <= device.free // 2


def test_account_that_the_user_begins_anew_shows_nothing(device):
    values, devices = of_all_kinds(), Devices(share=0.5)
    device.allocated = 1000
    brought(devices, values)
    device.free, device.allocated = device.taken[0], -device.taken[0]  # as after reset_accumulated_memory_stats
    brought(devices, values)
    assert sum(device.taken[1:]) <= device.free // 2


def test_more_memory_than_is_kept_is_taken_of_what_is_free(device):
    values = {"first": torch.rand(100, dtype=torch.float64), "second": torch.rand(3000)}
    devices = Devices(share=0.75)
    brought(devices, {"first": values["first"]})
    (kept,) = device.taken
    device.free = 12_000  # so that the share of it and of what is kept would suffice for both, and that of it does not
    expected = expected_of(values)
    found, _, _ = brought(devices, values)
    assert differing(found, values, expected) == []
    assert all(taken <= max(kept, 0.75 * device.free) for taken in device.taken)


@pytest.mark.parametrize("backend", ["cudaMallocAsync", "pluggable"])
def test_other_allocators_are_not_asked_what_they_cannot_say(device, backend):
    device.backend = backend
    values, devices = of_all_kinds(), Devices(share=0.5)
    expected = expected_of(values)
    found, _, (_,) = brought(devices, values)
    assert differing(found, values, expected) == []
    device.free = device.taken[0]
    brought(devices, values)
    assert sum(device.taken[1:]) <= device.free // 2


def transposed(rows):
    return torch.arange(float(rows * 8)).view(8, rows).t()


def test_values_out_of_order_take_no_more_memory_than_others(device):
    values = {str(number): transposed(64) if number % 3 else torch.rand(64, 8) for number in range(20)}
    expected = expected_of(values)
    _, rows, _ = brought(Devices(share=0.0), values)
    device.free = 2 * bytes_of(rows)
    found, _, (_,) = brought(Devices(share=0.5), values)
    assert differing(found, values, expected) == []
    assert device.taken == [bytes_of(rows)]


STRANGE = [
    pytest.param(lambda: torch.tensor([1 + 2j, 3 + 4j]).conj(), id="conjugated"),
    pytest.param(lambda: torch._neg_view(torch.tensor([1, 2], dtype=torch.int8)), id="negated"),
    pytest.param(lambda: transposed(2), id="transposed"),
    pytest.param(lambda: torch.arange(24.0).view(2, 3, 4)[:, 1], id="sliced"),
    pytest.param(lambda: torch.arange(3.0).expand(2, 3), id="expanded"),
    pytest.param(lambda: torch.arange(24.0).view(4, 3, 2)[1:].permute(2, 0, 1), id="permuted"),
    pytest.param(lambda: torch.randn(3, 4, dtype=torch.complex64).conj().t(), id="adjoint"),
    pytest.param(lambda: torch.randn(3, 4, dtype=torch.complex64).conj().imag, id="imaginary"),
    pytest.param(lambda: torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last), id="channels last"),
]


@pytest.mark.parametrize("make", STRANGE)
def test_what_a_stream_has_still_to_write_is_in_the_copy(device, make):
    value, shared = make(), make().untyped_storage().nbytes() < make().nbytes
    expected = expected_of({"value": value + 1})

    def write():
        (value[:1] if shared else value).add_(1)

    device.unfinished.append(write)
    found, _, _ = brought(Devices(share=0.5), {"value": value})
    assert differing(found, {"value": value}, expected) == []


@pytest.fixture
def copies(monkeypatch, device):
    """Copies to the host as torch makes them from a device: they arrive later, and signs are changed on the host.

    What is out of order is first put in order on the device, for which there is no memory here.
    """
    copy, on_their_way = torch.Tensor.copy_, []

    def copy_later(room, value, non_blocking=False):
        if any(value is each for each in device.values) and not value.is_contiguous():
            raise torch.OutOfMemoryError
        raw = value.conj() if value.is_conj() else torch._neg_view(value) if value.is_neg() else value
        if non_blocking:
            on_their_way.append(lambda: copy(room, raw))
        else:
            copy(room, raw)
        if value.is_conj():
            room.conj_physical_()
        if value.is_neg():
            room.neg_()
        return room

    def copy_all_later(rooms, values, non_blocking):
        for room, value in zip(rooms, values, strict=True):
            copy_later(room, value, non_blocking)

    monkeypatch.setattr(torch.Tensor, "copy_", copy_later)
    monkeypatch.setattr(torch, "_foreach_copy_", copy_all_later)
    return on_their_way


@pytest.mark.parametrize("make", STRANGE)
def test_values_out_of_order_come_without_memory_of_the_device(device, copies, make):
    values = {"first": torch.ones(3, dtype=torch.int16), "value": make()}
    device.values, expected = list(values.values()), expected_of(values)
    found, _, _ = brought(Devices(share=0.0), values)
    for arrive in copies:
        arrive()
    assert differing(found, values, expected) == []

"""How much memory of a device the copies on it take, and when they do without."""

from __future__ import annotations

import contextlib

import pytest
import torch

from keepbest.staging.device import Devices
from keepbest.staging.rooms import sizes_of
from tests.staging.pretended import CPU, GIB, brought, bytes_of
from tests.staging.test_copies import differing, expected_of, of_all_kinds, rooms_for
from tests.staging.test_devices import transposed


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


def out_of_memory(*_arguments, **_settings):
    raise torch.AcceleratorError("CUDA error: out of memory")


def test_no_memory_for_a_stream(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", out_of_memory)
    values, devices = of_all_kinds(), Devices(share=0.5)
    expected = expected_of(values)
    with contextlib.suppress(RuntimeError):  # as the thread does that calls it
        devices.get_ready(CPU, {torch.float32}, [1])
    found, _, events = brought(devices, values)
    assert differing(found, values, expected) == []
    assert (events, device.taken) == ([], [])


def test_no_memory_for_the_code_that_makes_a_clone(device, monkeypatch):
    monkeypatch.setattr(torch, "cat", out_of_memory)
    values = of_all_kinds()
    expected = expected_of(values)
    found, _, events = brought(Devices(share=0.5), values)
    assert differing(found, values, expected) == []
    assert not events  # all has arrived


@pytest.mark.parametrize("name", ["Stream", "cat"])
def test_other_errors_of_the_device_are_raised(device, monkeypatch, name):
    def fail(*_arguments, **_settings):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda if name == "Stream" else torch, name, fail)
    with pytest.raises(torch.AcceleratorError, match="illegal"):
        brought(Devices(share=0.5), of_all_kinds())


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


def test_memory_for_the_first_clone_is_taken_beforehand(device):
    values, devices = of_all_kinds(), Devices(share=0.5)
    expected = expected_of(values)
    devices.get_ready(CPU, {torch.float32}, [size.nbytes for size in sizes_of(rooms_for(values))])
    (prepared,) = device.taken
    device.free -= prepared
    found, _, _ = brought(devices, values)
    assert differing(found, values, expected) == []
    assert device.taken[1] <= prepared  # which torch takes from what it has kept


@pytest.mark.parametrize("free", [0.0, 0.4, 1.0], ids="{} of it is free too".format)
def test_memory_that_torch_keeps_is_used_whole_for_the_next_clone(device, free):
    values, devices = of_all_kinds(), Devices(share=0.5)
    brought(devices, values)
    device.free = int(free * device.taken[0])
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


def test_values_out_of_order_take_no_more_memory_than_others(device):
    values = {str(number): transposed(64) if number % 3 else torch.rand(64, 8) for number in range(20)}
    expected = expected_of(values)
    _, rows, _ = brought(Devices(share=0.0), values)
    device.free = 2 * bytes_of(rows)
    found, _, (_,) = brought(Devices(share=0.5), values)
    assert differing(found, values, expected) == []
    assert device.taken == [bytes_of(rows)]

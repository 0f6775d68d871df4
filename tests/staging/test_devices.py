"""The way from a device, with the CPU in its place: what is copied where, and in which order.

What only a device can show is in `tests/cuda`: that streams are waited for, that memory is pinned, and what it costs.
"""

from __future__ import annotations

import pytest
import torch

from keepbest.staging.device import Devices
from tests.staging.pretended import CPU, brought, bytes_of
from tests.staging.test_copies import differing, expected_of, of_all_kinds, rooms_for


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


def test_interruption_leaves_nothing_on_its_way(device):
    device.interruption = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        brought(Devices(share=0.5), {"a": torch.ones(3)})
    assert device.log[-1] == "wait for all streams"


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


def transposed(rows):
    return torch.arange(float(rows * 8)).view(8, rows).t()


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


def stored(value):
    """What a view has in memory, without its signs."""
    return value.conj() if value.is_conj() else torch._neg_view(value) if value.is_neg() else value


def change_signs_as_in(value, room):
    if value.is_conj():
        room.conj_physical_()
    if value.is_neg():
        room.neg_()


@pytest.fixture(params=[False, True], ids=["full", "free"])
def copies(request, monkeypatch, device):
    """Copies to the host as torch makes them from a device: they arrive later, and signs are changed on the host.

    What is out of order, or has other signs, is first put in order on the device, if it has memory for that. torch
    changes its signs there, and on the host once more.
    """
    copy, resolve, on_their_way = torch.Tensor.copy_, torch.Tensor.resolve_neg, []

    def is_on_device(value):
        return any(value.data_ptr() == each.data_ptr() for each in device.values)

    def take_memory(value):
        if is_on_device(value) and not request.param:
            raise torch.OutOfMemoryError

    def copy_later(room, value, non_blocking=False):
        if not value.is_contiguous():
            take_memory(value)
        if non_blocking:
            on_their_way.append(lambda: copy(room, stored(value)))
        else:
            copy(room, stored(value))
        if value.is_contiguous() or not is_on_device(value):  # else they are changed twice
            change_signs_as_in(value, room)
        return room

    def copy_all_later(rooms, values, non_blocking):
        for room, value in zip(rooms, values, strict=True):
            copy_later(room, value, non_blocking)

    def resolve_neg(value):
        if value.is_neg():
            take_memory(value)
        return resolve(value)

    monkeypatch.setattr(torch.Tensor, "copy_", copy_later)
    monkeypatch.setattr(torch.Tensor, "resolve_neg", resolve_neg)
    monkeypatch.setattr(torch, "_foreach_copy_", copy_all_later)
    return on_their_way


@pytest.mark.parametrize("make", STRANGE)
def test_values_out_of_order_need_no_memory_of_the_device(device, copies, make):
    values = {"first": torch.ones(3, dtype=torch.int16), "value": make()}
    device.values, expected = list(values.values()), expected_of(values)
    found, _, _ = brought(Devices(share=0.0), values)
    for arrive in copies:
        arrive()
    assert differing(found, values, expected) == []

"""What is staged has the bits of the moment, with anything beside it. The oracle is a clone of each tensor."""

from __future__ import annotations

import pytest
import torch

from keepbest.modules.raw_bytes import raw_bytes
from keepbest.staging.batch import Batch
from keepbest.staging.host import HostStaging
from keepbest.staging.slot import Like

LARGE = 1 << 15  # values, from which on torch copies a tensor on several threads


def numbers(*shape, dtype=torch.float32):
    return torch.randint(0, 100, shape).to(dtype)


def of_all_kinds():
    """Tensors that could be confused: only the first dimension differs, or their order in memory."""
    values = {
        "scalar": numbers(),
        "another scalar": numbers(),
        "row": numbers(7),
        "longer row": numbers(9),
        "matrix": numbers(3, 4),
        "taller matrix": numbers(5, 4),
        "wider matrix": numbers(3, 5),
        "transposed": numbers(4, 6).t(),
        "channels last": numbers(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "channels first": numbers(6, 3, 4, 5),
        "every second": numbers(20)[::2],
        "expanded": numbers(1, 4).expand(3, 4),
        "negated": torch._neg_view(numbers(2, 4)),
        "large": numbers(LARGE // 4, 4),
        "larger": numbers(LARGE, 4),
        "empty": numbers(0),
        "no rows": numbers(0, 4),
        "no columns": numbers(3, 0),
        "bits of no number": torch.tensor([0x7FA00001, -1], dtype=torch.int32).view(torch.float32),
        "conjugated": torch.randn(3, 4, dtype=torch.complex64).conj(),
        "complex": torch.randn(2, 4, dtype=torch.complex64),
    }
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.uint16, torch.bfloat16, torch.float16, torch.float64):
        values |= {f"{dtype} {rows}": numbers(rows, 4, dtype=dtype) for rows in (1, 2)}
    values |= {f"float8 {rows}": numbers(rows, 4).to(torch.float8_e4m3fn) for rows in (1, 2)}
    return values


def expected_of(values):
    return {key: raw_bytes(value.clone()).clone() for key, value in values.items()}


def rooms_for(values):
    return {key: Like(value.shape, value.dtype, "cpu") for key, value in values.items()}


@pytest.fixture
def staging():
    staging = HostStaging(lambda: None)
    yield staging
    staging.close()


def staged(staging, values):
    slot = staging.claim()
    slot.reserve(rooms_for(values))
    found = slot.put_all(Batch(values))
    slot.seal()
    slot.wait()
    return slot, found


def is_same(found, value, expected):
    is_alike = found.shape == value.shape and found.dtype == value.dtype and found.is_contiguous()
    return is_alike and torch.equal(raw_bytes(found), expected)


def differing(found, values, expected):
    """Keys of what was not staged as it was."""
    return [key for key, value in values.items() if not is_same(found[key], value, expected[key])]


def test_all_kinds_of_tensors_side_by_side(staging):
    values = of_all_kinds()
    expected = expected_of(values)
    _, found = staged(staging, values)
    assert differing(found, values, expected) == []


def test_values_that_are_put_one_by_one(staging):
    values = of_all_kinds()
    expected = expected_of(values)
    slot = staging.claim()
    slot.reserve(rooms_for(values))
    found = {key: slot.put(key, value) for key, value in reversed(values.items())}
    slot.seal()
    assert differing(found, values, expected) == []


def test_values_of_which_some_do_not_come(staging):
    values = of_all_kinds()
    some = {key: value for number, (key, value) in enumerate(values.items()) if number % 3}
    expected = expected_of(some)
    slot = staging.claim()
    slot.reserve(rooms_for(values))
    found = slot.put_all(Batch(some))
    slot.seal()
    assert differing(found, some, expected) == []


def test_staged_values_stay_while_the_weights_change(staging):
    values = {key: value for key, value in of_all_kinds().items() if key != "expanded"}
    expected = expected_of(values)
    _, found = staged(staging, values)
    for value in values.values():
        value.zero_()
    assert differing(found, values, expected) == []


def test_room_that_is_used_again_has_the_new_values(staging):
    values = of_all_kinds()
    slot, _ = staged(staging, values)
    slot.release()
    other = {key: value.clone().zero_() for key, value in values.items() if key != "matrix"}
    other["matrix"] = numbers(8, 4)  # of another shape now
    expected = expected_of(other)
    _, found = staged(staging, other)
    assert differing(found, other, expected) == []


def test_many_small_tensors_lie_in_memory_of_their_own(staging):
    values = {str(number): numbers(2, 4) for number in range(50)}
    _, found = staged(staging, values)
    assert all(found[key].untyped_storage().nbytes() == 32 for key in values)  # else a file would have all of them


def test_batch_that_is_copied_again_has_its_new_values(staging):
    values = {key: value for key, value in of_all_kinds().items() if key != "expanded"}
    batch = Batch(values)
    for beside in ({}, {"beside": numbers(2, 4), "longer beside": numbers(LARGE)}, {}):
        for value in values.values():
            value.copy_(numbers(*value.shape).to(value.dtype))
        expected = expected_of(values)
        slot = staging.claim()
        slot.reserve(rooms_for(values | beside))
        found = slot.put_all(batch)
        slot.seal()
        assert differing(found, values, expected) == []
        slot.release()

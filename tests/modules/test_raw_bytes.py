from __future__ import annotations

import pytest
import torch

from keepbest.modules.raw_bytes import on_host, raw_bytes
from tests.staging.test_copies import of_all_kinds


@pytest.mark.parametrize("key", of_all_kinds())
def test_copy_of_what_lies_in_memory_has_the_values(key):
    value = of_all_kinds()[key]
    expected = raw_bytes(value.clone()).clone()
    found = on_host(value)
    value.zero_() if key != "expanded" else value[0].zero_()
    assert (found.shape, found.dtype) == (value.shape, value.dtype)
    assert torch.equal(raw_bytes(found), expected)

"""Fingerprints where a device has no memory for what torch does on the way. The oracle is one with memory."""

from __future__ import annotations

import pytest
import torch

from keepbest.capture.alike import alike_of
from keepbest.capture.fingerprint import fingerprint, fingerprints_of_samples


class OnDevice(torch.Tensor):
    """On the CPU, and says that it is elsewhere."""

    device = torch.device("cuda")


LACK = {"torch": torch.OutOfMemoryError(), "CUDA": torch.AcceleratorError("CUDA error: out of memory")}


@pytest.fixture(params=LACK)
def full(request, monkeypatch):
    """Makes that device full when its function is called, until torch, or CUDA, was refused memory once."""
    refusals: list[str] = []
    arange, zeros, contiguous, reshape = torch.arange, torch.zeros, torch.Tensor.contiguous, torch.Tensor.reshape

    def unless_full(name, function):
        def call(*arguments, **options):
            if name in refusals:
                refusals.clear()
                raise LACK[request.param]
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(torch, "arange", unless_full("arange", lambda *ends, dtype, **_: arange(*ends, dtype=dtype)))
    monkeypatch.setattr(torch, "zeros", lambda *shape, dtype, **_: zeros(*shape, dtype=dtype))
    monkeypatch.setattr(torch, "cat", unless_full("cat", torch.cat))
    monkeypatch.setattr(torch.Tensor, "contiguous", unless_full("contiguous", contiguous))
    monkeypatch.setattr(torch.Tensor, "reshape", unless_full("reshape", reshape))
    return refusals.append


@pytest.mark.parametrize("what", ["arange", "contiguous"])
def test_fingerprint_is_the_same_without_memory(full, what):
    value = torch.rand(5, 7).t().as_subclass(OnDevice)
    expected = fingerprint(value)
    full(what)
    assert fingerprint(value) == expected
    assert fingerprint(value + 1) != expected


@pytest.mark.parametrize("what", ["reshape", "cat"])
def test_fingerprints_of_samples_are_the_same_without_memory(full, what):
    values = [torch.rand(50, 70).t(), torch.rand(3)]
    expected = fingerprints_of_samples(values)
    full(what)
    assert fingerprints_of_samples(values) == expected
    assert fingerprints_of_samples([value + 1 for value in values]) != expected


def test_state_beside_shards_is_the_same_without_memory(full):
    state = [("weight", "step", torch.tensor(3.0)), ("bias", "step", torch.tensor(-0.0))]
    expected = alike_of("optimizer", state)
    full("cat")
    assert alike_of("optimizer", state) == expected
    assert alike_of("optimizer", [(name, key, value + 1) for name, key, value in state]) != expected

"""The device of these tests, and weights on it that can be compared bit for bit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keepbest import BestKeeper

# "cpu" runs all that can run without a GPU, so that mistakes in the tests show where there is none.
DEVICE = torch.device(os.environ.get("CUDA_TESTS_DEVICE", "cuda"))
ON_CUDA = DEVICE.type == "cuda"
MIB = 1 << 20


class Weights(nn.Module):
    """Parameters of float dtypes, and buffers of all others, from tensors by name."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and tensor.element_size() > 1:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)


def wide(mebibytes: int, count: int = 1) -> Weights:
    """A model of so many MiB of random float32 values in `count` tensors."""
    rows = mebibytes * MIB // count // 4
    return Weights({f"w{number}": torch.rand(rows, device=DEVICE) for number in range(count)})


def copied(model: nn.Module) -> dict[str, Tensor]:
    """The weights on the host, as they are now on all streams."""
    finish()
    return {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}


def change(model: nn.Module) -> None:
    """Gives every weight another value, in place, on the current stream."""
    with torch.no_grad():
        for value in dict.fromkeys(model.state_dict().values()):
            alter(value)


def alter(value: Tensor) -> None:
    if value.dtype == torch.bool:
        value.logical_not_()
    elif value.element_size() == 1:
        value.view(torch.uint8).bitwise_xor_(1)
    elif value.numel():
        value.add_(1)


def keeper_of(model: nn.Module, folder: Path, file_format: str, async_save: bool, **settings: Any) -> BestKeeper:
    return BestKeeper(model, directory=folder, metric_key="loss", format=file_format, async_save=async_save, **settings)


def zero(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for value in model.state_dict().values():
            value.zero_()
    return model


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, shapes, dtypes and bits."""
    assert list(found) == list(expected)
    wrong = [name for name in expected if not same(found[name], expected[name])]
    assert not wrong, f"{len(wrong)} of {len(expected)} tensors differ: {wrong[:5]}"


def same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(raw(one), raw(other))


def raw(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def finish() -> None:
    if ON_CUDA:
        torch.cuda.synchronize()


@contextmanager
def another_stream() -> Iterator[None]:
    """A stream that waits for nobody, and for which nobody waits."""
    if not ON_CUDA:
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream()):
        yield


def keep_busy(milliseconds: int = 200) -> None:
    """Occupies the current stream for about so long, and returns at once."""
    if ON_CUDA:
        torch.cuda._sleep(milliseconds * 1_500_000)  # in cycles; no public function waits on the device

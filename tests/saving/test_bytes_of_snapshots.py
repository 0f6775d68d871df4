"""Files hold the values of the moment of the call, and nothing beside them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from keepbest import BestKeeper
from tests.kit.runs import update


class Uneven(nn.Module):
    """Weights that lie in memory in every way."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        flat = torch.randn(300)
        self.weights = nn.ParameterList(
            [
                torch.randn(20, 30),
                torch.randn(7, dtype=torch.float16),
                torch.randn(3, 5).t(),
                torch.randn(()),
                torch.empty(0, 4),
                flat[:100].view(10, 10),
                flat[100:].view(20, 10),
                torch.randn(4, dtype=torch.bfloat16),
            ]
        )
        self.register_buffer("bools", torch.tensor([True, False, True]))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("byte", torch.tensor([1, 2, 255], dtype=torch.uint8))
        self.register_buffer("wide", torch.randn(1, 3).repeat(4, 1))


def keep(directory, file_format, in_background):
    model = Uneven()
    settings = {"directory": directory, "metric_key": "loss", "format": file_format, "async_save": in_background}
    with BestKeeper(model, **settings) as keeper:
        model.wide = model.wide[:1].expand(4, 3)
        for number in (1, 2):
            keeper.observe(-number, update(number))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        keeper.flush()
        [path] = [path for path in keeper.best_path.glob("model.*") if path.is_file()]
    return path, Uneven().state_dict()


@pytest.mark.parametrize("file_format", ["torch", "safetensors"])
def test_files_have_the_bytes_of_the_weights_alone(file_format, tmp_path):
    path, expected = keep(tmp_path / "later", file_format, in_background=True)
    waited_for, _ = keep(tmp_path / "now", file_format, in_background=False)
    size = sum(value.nbytes for value in expected.values())
    assert path.stat().st_size < size + 6000
    assert abs(path.stat().st_size - waited_for.stat().st_size) < 1000  # the strides
    if file_format == "safetensors":
        assert path.read_bytes() == waited_for.read_bytes()
        return
    for is_mapped in (False, True):
        state = torch.load(path, weights_only=True, mmap=is_mapped)
        assert list(state) == list(expected)
        assert all(
            torch.equal(state[key], value) and state[key].dtype == value.dtype for key, value in expected.items()
        )
        assert is_mapped or all(value.untyped_storage().nbytes() == value.nbytes for value in state.values())

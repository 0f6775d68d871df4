"""Which numbers may be loaded into a model of another dtype."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from keepbest import BestKeeper, TrainingIteration, load
from keepbest.capture.conversion import judge, survives
from keepbest.errors import SnapshotError
from tests.kit.pool import run_ranks
from tests.kit.strategies import WRAPS, whole_weights

REF = "best_model.loss"


@pytest.mark.parametrize(
    ("saved", "target", "verdict"),
    [
        ("float32", "float32", "fits"),
        ("bfloat16", "float32", "fits"),
        ("float16", "bfloat16", "fits"),
        ("float8_e4m3fn", "bfloat16", "fits"),
        ("float64", "float32", "depends"),
        ("float32", "bfloat16", "depends"),
        ("float32", "float16", "depends"),
        ("int8", "float32", "fits"),
        ("int64", "float32", "depends"),
        ("bool", "float16", "fits"),
        ("uint8", "int16", "fits"),
        ("int64", "int8", "depends"),
        ("int8", "uint8", "depends"),
        ("complex64", "complex128", "fits"),
        ("float32", "int8", "never"),
        ("float32", "bool", "never"),
        ("float32", "float8_e4m3fn", "never"),
        ("float8_e5m2", "float8_e4m3fn", "never"),
        ("complex64", "float32", "never"),
        ("float32", "complex64", "never"),
        ("float32", "quint8", "never"),
    ],
)
def test_dtype_decides_what_may_be_loaded(saved, target, verdict):
    assert judge(getattr(torch, saved), getattr(torch, target)) == verdict


@pytest.mark.parametrize(
    ("values", "target", "survive"),
    [
        (torch.tensor([1.0, -65504.0, torch.inf, torch.nan]), torch.float16, True),
        (torch.tensor([1e5]), torch.float16, False),
        (torch.tensor([3.4e38]), torch.bfloat16, False),
        (torch.tensor([1e300], dtype=torch.float64), torch.float32, False),
        (torch.tensor([127, -128]), torch.int8, True),
        (torch.tensor([128]), torch.int8, False),
        (torch.tensor([-1], dtype=torch.int8), torch.uint8, False),
        (torch.tensor([1, 0]), torch.bool, True),
        (torch.tensor([2]), torch.bool, False),
        (torch.tensor([2**24]), torch.float32, True),
        (torch.tensor([2**24 + 1]), torch.float32, False),
        (torch.tensor([2**63 - 1]), torch.float32, False),
        (torch.tensor([2**16 - 1], dtype=torch.uint16), torch.int16, False),
        (torch.tensor([2**63 + 1], dtype=torch.uint64), torch.int64, False),
        (torch.tensor([5], dtype=torch.uint64), torch.int8, True),
        (torch.zeros(0), torch.float16, True),
    ],
)
def test_values_decide_where_the_dtype_does_not(values, target, survive):
    assert survives(values, target) == survive


class Holder(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.first = nn.Parameter(torch.zeros(3, 2))
        self.value = nn.Parameter(value, requires_grad=False)


def load_with_dtype(directory, file_format, value, dtype):
    """What becomes of the model, and the reason if the load was refused."""
    run = directory / f"{file_format}{dtype}"
    saved = Holder(value)
    nn.init.ones_(saved.first)
    with BestKeeper(saved, directory=run, metric_key="loss", format=file_format) as keeper:
        keeper.observe(1.0, TrainingIteration(update=1))
    model = WRAPS["fsdp2"](Holder(torch.zeros(value.shape, dtype=dtype)))
    try:
        load(run, REF, model)
    except SnapshotError as error:
        return [found.tolist() for found in whole_weights(model)], str(error)
    return [found.tolist() for found in whole_weights(model)], ""


ONES, ZEROS = [[1.0, 1.0]] * 3, [[0.0, 0.0]] * 3


@pytest.mark.parametrize("file_format", ["torch", "safetensors", "dcp"])
def test_numbers_that_would_change_are_refused_on_every_rank(file_format, tmp_path):
    value = torch.tensor([[1.0, 2.0], [3.0, 1e6]])
    reasons = {
        torch.int8: "float32 cannot become int8 without a loss for value. Nothing was loaded",
        torch.float16: "values that the dtype of the model cannot hold: what the model has as float16 for value",
    }
    if torch.__version__ < "2.11":
        del reasons[torch.int8]  # FSDP2 takes no model of integers
    for dtype, reason in reasons.items():
        for weights, message in run_ranks(load_with_dtype, 2, tmp_path, file_format, value, dtype):
            assert weights == [ZEROS, [[0, 0], [0, 0]]]
            assert reason in message


@pytest.mark.parametrize("file_format", ["torch", "safetensors", "dcp"])
def test_numbers_that_fit_are_converted(file_format, tmp_path):
    value = torch.tensor([[1.0, 2.0], [3.0, 100.0]])
    for dtype in (torch.float16, torch.float64):
        expected = [ONES, value.tolist()], ""
        assert run_ranks(load_with_dtype, 2, tmp_path, file_format, value, dtype) == [expected] * 2

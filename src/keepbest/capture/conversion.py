"""Which numbers of one dtype may be loaded into a tensor of another: those that stay what they are. **Rank-local**.

| saved          | model                            | loaded                                                    |
|----------------|----------------------------------|-----------------------------------------------------------|
| float, float8  | float16, bfloat16, float32, ...  | rounded, unless a finite value would become infinite      |
| float          | float8, unless it is the same    | never: such weights need a scale                          |
| float          | integer, bool                    | never                                                     |
| integer, bool  | integer, bool                    | if every value is in the range                            |
| integer, bool  | float                            | if every value stays exactly what it is                   |
| complex        | complex                          | as floats                                                 |
| complex        | any other, and the reverse       | never                                                     |
"""

from __future__ import annotations

from typing import Literal

import torch

_FLOATS = {torch.bfloat16, torch.float16, torch.float32, torch.float64}
_SMALL_FLOATS = {
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
}
_COMPLEX = {torch.complex32, torch.complex64, torch.complex128}
_INTEGERS = {
    torch.bool, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64,
}  # fmt: skip
_LARGEST_EXACT = 2**53  # up to this, a float64 holds every integer exactly

Verdict = Literal["fits", "depends", "never"]


def judge(saved: torch.dtype, target: torch.dtype) -> Verdict:
    """Whether values of dtype `saved` can be loaded into a tensor of dtype `target`, or it depends on the values."""
    if saved == target:
        return "fits"
    if (saved in _FLOATS | _SMALL_FLOATS and target in _FLOATS) or (saved in _COMPLEX and target in _COMPLEX):
        return "fits" if torch.finfo(target).max >= torch.finfo(saved).max else "depends"
    if saved in _INTEGERS and target in _FLOATS:
        return "fits" if _range(saved)[1] <= 2 / torch.finfo(target).eps else "depends"
    if saved in _INTEGERS and target in _INTEGERS:
        (low, high), (lowest, highest) = _range(saved), _range(target)
        return "fits" if lowest <= low and high <= highest else "depends"
    return "never"


def survives(values: torch.Tensor, target: torch.dtype) -> bool:
    """Whether all of the dense `values` stay what they are in `target`, for dtypes where it depends on them."""
    if values.numel() == 0:
        return True
    if values.dtype not in _INTEGERS:
        values = values.float() if values.dtype in _SMALL_FLOATS else values
        return not bool((values.isfinite() & ~values.to(target).isfinite()).any())
    numbers = values.to(torch.int64)
    low, high = int(numbers.min()), int(numbers.max())
    if values.dtype == torch.uint64 and low < 0:
        return False  # beyond all integers that torch computes with
    if target in _FLOATS:
        is_exact = max(-low, high) <= _LARGEST_EXACT
        return is_exact and bool((numbers.to(target).to(torch.float64) == numbers).all())
    lowest, highest = _range(target)
    return lowest <= low and high <= highest


def _range(dtype: torch.dtype) -> tuple[int, int]:
    if dtype == torch.bool:
        return 0, 1
    limits = torch.iinfo(dtype)
    return limits.min, limits.max

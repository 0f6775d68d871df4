"""Tensors of a state dict that are one and the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def first_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """For each further name of a tensor its first name. Tensors without elements are never one."""
    seen: dict[Any, str] = {}
    tied: dict[str, str] = {}
    for key, tensor in tensors.items():
        # A lazy conjugate lies where the tensor does, and is another one.
        kind = (tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg())
        place = (tensor.data_ptr(), *kind) if tensor.numel() else key
        if (first := seen.setdefault(place, key)) != key:
            tied[key] = first
    return tied

"""Tensors of a state dict that are one and the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def first_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """For each further name of a tensor its first name. Tensors that are sparse or have no elements are never one."""
    seen: dict[Any, str] = {}
    tied: dict[str, str] = {}
    for key, tensor in tensors.items():
        # A lazy conjugate lies where the tensor does, and is another one.
        is_plain = tensor.layout == torch.strided and tensor.numel() > 0
        kind = (tensor.shape, tensor.stride() if is_plain else (), tensor.dtype, tensor.is_conj(), tensor.is_neg())
        place = (tensor.data_ptr(), *kind) if is_plain else key
        if (first := seen.setdefault(place, key)) != key:
            tied[key] = first
    return tied

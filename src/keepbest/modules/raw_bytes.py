"""The values of a tensor as bytes, for files, digests and transfers that do not know its dtype."""

from __future__ import annotations

import torch


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a dense tensor, in order, as one row of bytes: the same memory where they lie side by side."""
    whole = tensor.detach().resolve_conj().resolve_neg().contiguous()
    # Not reshape(-1): a tensor of one element is contiguous with any stride, and would keep it.
    return whole.as_strided((whole.numel(),), (1,)).view(torch.uint8)

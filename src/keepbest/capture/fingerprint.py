"""Fingerprints by which ranks see whether they hold the same values. **Rank-local**."""

from __future__ import annotations

import pickle
from collections.abc import Iterable

import torch
import xxhash

from keepbest.capture.refusals import is_plain_data
from keepbest.modules.kinds import lacks_memory
from keepbest.modules.raw_bytes import buffer_of, raw_bytes

_WORDS_AT_ONCE = 1 << 22  # of a tensor on an accelerator, so that what is computed in between stays small
_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, so that no word is lost when it is multiplied modulo 2**64
_SAMPLED = 256  # elements of each tensor that show whether its values were exchanged


def fingerprint(tensor: torch.Tensor) -> str:
    """A digest of all values of a plain tensor.

    Every byte counts, since ranks may differ in a single row. On the CPU this runs at the speed of the memory. On an
    accelerator the tensor is reduced where it is, so only eight bytes of it travel.
    """
    values = _bytes_of(tensor)
    if values.device.type == "cpu":
        return xxhash.xxh3_64_hexdigest(buffer_of(values)) if values.numel() else ""
    return f"{_reduced(values) & ((1 << 64) - 1):016x}"


def fingerprint_of_sample(tensor: torch.Tensor) -> str:
    """A digest of some values of a plain tensor. It shows what trained apart, which changes nearly all of them."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        return fingerprint(tensor)
    return xxhash.xxh3_64_hexdigest(buffer_of(_some_of(tensor)))


def sample(tensors: Iterable[torch.Tensor], data: Iterable[object]) -> str:
    """A digest of where tensors lie, of how often torch has changed them, of some of their values, and of all `data`.

    It notices weights that were exchanged for others, also where that went past torch's count of changes, as a copy
    into `parameter.data` does. It costs next to nothing.
    """
    seen = xxhash.xxh3_64()
    for tensor in tensors:
        seen.update(f"{_version_of(tensor)} {tuple(tensor.shape)}".encode())
        if tensor.layout != torch.strided or tensor.is_quantized or lacks_memory(tensor):
            continue
        seen.update(f"{tensor.data_ptr()}".encode())
        seen.update(buffer_of(_some_of(tensor)))
    for value in data:
        # What cannot be pickled cannot be kept either. The check before each save refuses it.
        seen.update(pickle.dumps(value) if is_plain_data(value) else b"")
    return seen.hexdigest()


def _some_of(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLED)].cpu()


def _version_of(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001  # torch documents it for this use


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if tensor.is_quantized:
        tensor = tensor.dequantize()  # the integers alone would leave out their scale
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    return raw_bytes(tensor)


def _reduced(values: torch.Tensor) -> int:
    whole = values.numel() // 8 * 8
    words = [values[:whole].view(torch.int64), values[whole:].to(torch.int64)]
    total = 0
    for number, piece in enumerate(each for part in words for each in torch.split(part, _WORDS_AT_ONCE)):
        # Each word counts by its place. Sums of integers are the same in any order.
        places = torch.arange(1, piece.numel() + 1, dtype=torch.int64, device=piece.device)
        total += (number + 1) * int(((piece ^ (piece >> 29)) * (places * _FACTOR + 1)).sum().item())
    return total

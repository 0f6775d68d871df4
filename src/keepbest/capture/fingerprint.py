"""Fingerprints by which ranks see whether they hold the same values. **Rank-local**."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence

import torch
import xxhash

from keepbest.capture.refusals import is_plain_data
from keepbest.modules.device_memory import unless_full
from keepbest.modules.kinds import lacks_memory
from keepbest.modules.raw_bytes import buffer_of, joined_on_host, on_host, raw_bytes

_WORDS_AT_ONCE = 1 << 20  # of a tensor on an accelerator, so that what is computed in between stays small
_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, so that no word is lost when it is multiplied modulo 2**64
_SAMPLED = 256  # elements of each tensor that show whether its values were exchanged


def fingerprint(tensor: torch.Tensor) -> str:
    """A digest of all values of a plain tensor.

    Every byte counts, since ranks may differ in a single row. On the CPU this runs at the speed of the memory. On an
    accelerator the tensor is reduced where it is, so only eight bytes of it travel, or on the host where there is no
    memory for that.
    """
    if tensor.device.type == "cpu":
        values = _bytes_of(tensor)
        return xxhash.xxh3_64_hexdigest(buffer_of(values)) if values.numel() else ""
    if _is_packed(tensor):
        total = _reduced(_bytes_of(tensor))
    else:
        total = unless_full(lambda: _reduced(raw_bytes(tensor)), lambda: _reduced(raw_bytes(on_host(tensor))))
    return f"{total & ((1 << 64) - 1):016x}"


def fingerprints_of_samples(tensors: Sequence[torch.Tensor]) -> list[str]:
    """A digest of some values of each plain tensor. It shows what trained apart, which changes nearly all of them."""
    packed = {at: fingerprint(tensor) for at, tensor in enumerate(tensors) if _is_packed(tensor)}
    samples = iter(_samples_of([tensor for at, tensor in enumerate(tensors) if at not in packed]))
    return [
        packed[at] if at in packed else xxhash.xxh3_64_hexdigest(buffer_of(next(samples))) for at in range(len(tensors))
    ]


def sample(tensors: Iterable[torch.Tensor], data: Iterable[object]) -> str:
    """A digest of where tensors lie, of how often torch has changed them, of some of their values, and of all `data`.

    It notices weights that were exchanged for others, also where that went past torch's count of changes, as a copy
    into `parameter.data` does. It costs next to nothing.
    """
    seen = xxhash.xxh3_64()
    in_memory: list[torch.Tensor] = []
    for tensor in tensors:
        seen.update(f"{_version_of(tensor)} {tuple(tensor.shape)}".encode())
        if not (_is_packed(tensor) or lacks_memory(tensor)):
            seen.update(f"{tensor.data_ptr()}".encode())
            in_memory.append(tensor)
    for values in _samples_of(in_memory):
        seen.update(buffer_of(values))
    for value in data:
        # What cannot be pickled cannot be kept either. The check before each save refuses it.
        seen.update(pickle.dumps(value) if is_plain_data(value) else b"")
    return seen.hexdigest()


def _is_packed(tensor: torch.Tensor) -> bool:
    return tensor.layout != torch.strided or tensor.is_quantized


def _samples_of(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Bytes of some values of each tensor, on the CPU."""
    samples = list(map(_sample_of, tensors))
    for device in {sample.device for sample in samples}:
        places = [at for at, sample in enumerate(samples) if sample.device == device]
        found = joined_on_host([samples[at] for at in places])
        sizes = [samples[at].numel() for at in places]
        for at, values in zip(places, torch.split(found, sizes), strict=True):
            samples[at] = values
    return samples


def _sample_of(tensor: torch.Tensor) -> torch.Tensor:
    every = max(1, tensor.numel() // _SAMPLED)

    def sampled(values: torch.Tensor) -> torch.Tensor:
        return raw_bytes(values.reshape(-1)[::every])  # torch copies what does not lie in order

    return unless_full(lambda: sampled(tensor.detach()), lambda: sampled(on_host(tensor)))


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
    if values.storage_offset() % 8:
        values = values.clone()  # torch reads no words across their borders
    whole = values.numel() // 8 * 8
    words = [values[:whole].view(torch.int64), values[whole:].to(torch.int64)]
    factors = torch.arange(1, min(_WORDS_AT_ONCE, max(map(len, words))) + 1, dtype=torch.int64, device=values.device)
    factors.mul_(_FACTOR).add_(1)
    total = torch.zeros((), dtype=torch.int64, device=values.device)  # read once, since that waits for the device
    for number, piece in enumerate(each for part in words for each in torch.split(part, _WORDS_AT_ONCE)):
        # Each word counts by its place. Sums of integers are the same in any order.
        mixed = (piece >> 29).bitwise_xor_(piece).mul_(factors[: len(piece)])
        total += mixed.sum() * (number + 1)
    return int(total.item())

"""Names that are safe to be files, made from names that may hold anything. Pure.

Different names stay different, and no name can climb out of its folder. On a file system that folds case, names stay
different if they differ in more than case.
"""

from __future__ import annotations

import hashlib
import re
import string

from keepbest.iteration import TrainingIteration

_KEPT = frozenset((string.ascii_letters + string.digits + "_-").encode())
_SAFE = re.compile(r"[A-Za-z0-9_%=~-][A-Za-z0-9_%=~.-]*")
_LONGEST = 100  # two of them, with all that is added, are less than the 255 bytes that a file name may have
_HASH_DIGITS = 16
REF_PREFIX = "best_model."
RESUME_PREFIX = "resume."
LATEST = f"{RESUME_PREFIX}latest"
"""Ref on the snapshot that training continues from."""


def metric_name(metric_key: str) -> str:
    """File name of a metric key: `loss/val/total` becomes `loss.val.total`."""
    return _shortened(".".join(map(_encoded, metric_key.split("/"))))


def part_name(name: str) -> str:
    """File name, without ending, of a part of a model; its dots separate nested submodels and stay."""
    return _shortened(".".join(map(_encoded, name.split("."))))


def best_ref(metric_key: str, keeper_id: str | None = None) -> str:
    """Name of the ref on the best of a metric; it also names the keeper that owns it."""
    suffix = "" if keeper_id is None else f".id={metric_name(keeper_id)}"
    return f"{REF_PREFIX}{metric_name(metric_key)}{suffix}"


def tolerance_ref(best: str, tolerance: int) -> str:
    """Name of the ref on what early stopping with `tolerance` would have kept."""
    return f"{best}.tolerance={tolerance}"


def top_ref(best: str, place: int) -> str:
    """Name of the ref on the `place`-th best value, from 1."""
    return f"{best}.top={place}"


def resume_ref(iteration: TrainingIteration) -> str:
    """Name of the ref on the resume checkpoint of an iteration."""
    return f"{RESUME_PREFIX}{iteration}"


def is_safe(name: str) -> bool:
    """Whether `name`, read from a file that anybody may have written, is one entry of a folder and not hidden."""
    return bool(_SAFE.fullmatch(name))


def _encoded(component: str) -> str:
    data = component.encode("utf-8", errors="surrogatepass")
    return "".join(chr(byte) if byte in _KEPT else f"%{byte:02X}" for byte in data)


def _shortened(name: str) -> str:
    if len(name) <= _LONGEST:
        return name
    # "~" is never kept as it is, so a shortened name cannot be equal to one that is not.
    digest = hashlib.blake2b(name.encode(), digest_size=_HASH_DIGITS // 2).hexdigest()
    return f"{name[: _LONGEST - _HASH_DIGITS - 1]}~{digest}"

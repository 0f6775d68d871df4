"""State beside the shards of parameters: what is known to be a part of something, and what all ranks must have alike.

A plain tensor in the state of a sharded parameter may be the same on every rank, as `step` is, or be made of the shard
of this rank. Where its shape does not show which, the values of the ranks do. **Rank-local**.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from keepbest.errors import ConfigError
from keepbest.listing import listed, listed_ranks
from keepbest.modules.kinds import is_dense, is_dtensor, local_of
from keepbest.modules.nested import leaves, spelled
from keepbest.modules.raw_bytes import joined_on_host, raw_bytes

_WAY_OUT = "Leave the optimizer out of training_state, or use one whose state is made of DTensors"

Alike = dict[str, str]
"""By the name of a parameter and the key of its state, in words: a text that is equal where the values are."""


def is_split(parameter: torch.Tensor) -> bool:
    """Whether each rank holds a part of a parameter."""
    return is_dtensor(parameter) and not all(placement.is_replicate() for placement in parameter.placements)


def refuse_a_part(name: str, key: object, value: object, parameter: torch.Tensor) -> None:
    """Check that the state of a parameter is no part of something that other ranks have other parts of.

    Args:
        name: Name of the parameter.
        key: Key of its state.
        value: State: a tensor, or data that may hold some.
        parameter: Parameter.

    Raises:
        ConfigError: If it is one, or nobody can load it again.
    """
    if is_dtensor(value):
        if not is_dtensor(parameter) or value.shape != parameter.shape:
            raise ConfigError(
                f"{key!r} of the optimizer for {name!r} is a DTensor of shape {list(value.shape)}, while the parameter "
                f"has shape {list(parameter.shape)}{'' if is_dtensor(parameter) else ' and is no DTensor'}. So it is "
                "not known how other ranks would load it. Leave the optimizer out of training_state, or use one "
                "whose state is like its parameters"
            )
        return
    if not is_split(parameter):
        return
    shard = local_of(parameter).shape
    for path, each in leaves(value):
        if not isinstance(each, torch.Tensor) or is_dtensor(each):
            continue
        is_whole_shard = each.dim() > 0 and each.shape == shard != parameter.shape
        if each.numel() > 1 or is_whole_shard:
            raise ConfigError(
                f"{key!r} of the optimizer for {name!r} {_has_at(path)} a plain tensor of shape {list(each.shape)}, "
                "while the parameter is sharded. So it is known neither which part of it other ranks hold, nor how "
                f"they would load it. {_WAY_OUT}"
            )


def alike_of(part: str, found: Iterable[tuple[str, object, object]]) -> Alike:
    """What all ranks that hold some state must have alike, in texts that are short.

    Args:
        part: Name of the training state.
        found: Names of sharded parameters, keys of their state, and what it is.
    """
    alike: dict[str, list[str]] = {}
    tensors: dict[torch.device, list[tuple[str, str, torch.Tensor]]] = {}
    for name, key, value in found:
        if is_dtensor(value):
            continue
        what = f"{key!r} of the optimizer {part!r} for {name!r}"
        alike[what] = []
        for path, each in leaves(value):
            if not isinstance(each, torch.Tensor):
                alike[what].append(f"{spelled(path)} {each!r}")
            elif is_dense(each) and not is_dtensor(each):
                tensors.setdefault(each.device, []).append((what, spelled(path), each))
    for group in tensors.values():
        for (what, where, _), text in zip(group, _texts([tensor for *_, tensor in group]), strict=True):
            alike[what].append(f"{where} {text}")
    return {what: "; ".join(sorted(texts)) for what, texts in alike.items()}


def refuse_unlike(found: Sequence[Alike]) -> None:
    """Check that the ranks have alike what they all have.

    Args:
        found: What each rank has.

    Raises:
        ConfigError: If not. The same on every rank.
    """
    differing: dict[str, list[int]] = {}
    for what in dict.fromkeys(what for each in found for what in each):
        ranks = [rank for rank, each in enumerate(found) if what in each]
        if len({found[rank][what] for rank in ranks}) > 1:
            differing[what] = ranks
    if differing:
        ranks = sorted({rank for each in differing.values() for rank in each})
        raise ConfigError(
            f"{listed_ranks(ranks)} differ in what must be equal: {listed(differing)}. Step the optimizer on every "
            "rank alike. Of what is no shard a snapshot has the state of one rank, and all would load that. "
            f"{_WAY_OUT}. Where nothing is sharded, PerRank(optimizer) keeps the state of each rank"
        )


def _has_at(path: Sequence[object]) -> str:
    return f"has at {spelled(tuple(path))}" if path else "is"


def _texts(tensors: Sequence[torch.Tensor]) -> Iterator[str]:
    """The values of tensors of one device as text, after one transfer."""
    rows = [raw_bytes(tensor) for tensor in tensors]
    together = bytes(joined_on_host(rows).tolist())
    at = 0
    for tensor, row in zip(tensors, rows, strict=True):
        yield f"{tensor.dtype} {together[at : at + row.numel()].hex()}"
        at += row.numel()

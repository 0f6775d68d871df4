"""The exchange of evaluation results: from every rank's share to those of the whole dataset, on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from keepbest.errors import DesyncError, RankFailedError
from keepbest.ranks import Ranks, is_of_gloo

Results: TypeAlias = Tensor | dict[str, Tensor]


def gather_in_dataset_order(
    step: str, work: Callable[[], Results], *, dataset_length: int, ranks: Ranks, remedy: str | None = None
) -> Results:
    """Do `work` on every rank and merge the results. **Collective**.

    The ranks must have evaluated the samples that `evaluation_indices` gives them.

    Args:
        step: Description of the work, in words. The same on every rank.
        work: Rank-local function that returns a CPU tensor of any dtype, or a dict of them, each of shape
            `[ceil(dataset_length / world_size), ...]`.
        dataset_length: Number of samples of the dataset.
        ranks: Ranks that take part.
        remedy: As `Ranks.agree` takes it.

    Returns:
        The same structure with tensors of shape `[dataset_length, ...]`: one row for each sample, in the order of the
        dataset, without repetitions; the same bits on every rank.

    Raises:
        KeepBestError: On every rank, if `work` failed on a rank or returned another number of rows. See `Ranks.agree`.
        DesyncError: On every rank, if the names, shapes or dtypes differ between ranks.
    """
    results: list[Results] = []

    def describe() -> list[str]:
        results.append(work())
        named = _by_name(results[0])
        _check_rows(named, rows=-(-dataset_length // ranks.world_size))
        return [f"{name} {tensor.dtype} {list(tensor.shape)}".strip() for name, tensor in named.items()]

    layouts = ranks.gather_json(step, describe, remedy=remedy)
    if any(layout != layouts[0] for layout in layouts):
        found = "; ".join(f"rank {rank}: {', '.join(layout)}" for rank, layout in enumerate(layouts))
        raise DesyncError(
            f"the ranks have results of different names, shapes or dtypes in step '{step}': {found}. "
            "They must be the same on every rank"
        )
    named = _by_name(results[0])
    shares = _all_gather(list(named.values()), ranks)
    whole = [share.transpose(0, 1).flatten(0, 1)[:dataset_length] for share in shares]
    return whole[0] if isinstance(results[0], Tensor) else dict(zip(named, whole, strict=True))


def _all_gather(tensors: list[Tensor], ranks: Ranks) -> list[Tensor]:
    """Gather each of the tensors from all ranks, stacked by rank: `[world_size, rows, ...]`."""
    if ranks.control_group is None:
        return [tensor.unsqueeze(0) for tensor in tensors]
    # One collective for all of them, as bytes, because gloo does not know every dtype.
    parts = [tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors]
    sent = torch.cat([torch.empty(0, dtype=torch.uint8, device="cpu"), *parts])
    received = torch.empty(ranks.world_size, len(sent), dtype=torch.uint8, device="cpu")
    try:
        # Of the group itself: where a rank is lost, torch.distributed fails to describe a group that it does not keep.
        ranks.control_group.allgather([list(received.unbind(0))], [sent]).wait()
    except BaseException as error:
        ranks.poison("a gather of evaluation results was cut off")
        if not is_of_gloo(error):
            raise
        raise RankFailedError(
            f"rank {ranks.rank} of {ranks.world_size} lost contact with another rank while it gathered evaluation "
            f"results: {error}. A process has probably died: look for the first error in the output of the other ranks."
        ) from error
    columns = torch.split(received, [len(part) for part in parts], dim=1)
    return [
        # A copy of its own, because the bytes of a wider dtype must start at a multiple of its size.
        column.clone(memory_format=torch.contiguous_format)
        .flatten()
        .view(tensor.dtype)
        .reshape(ranks.world_size, *tensor.shape)
        for column, tensor in zip(columns, tensors, strict=True)
    ]


def _by_name(results: Results) -> dict[str, Tensor]:
    return {"": results} if isinstance(results, Tensor) else results


def _check_rows(named: dict[str, Tensor], *, rows: int) -> None:
    for name, tensor in named.items():
        if tensor.ndim == 0 or len(tensor) != rows:
            raise ValueError(
                f"expected a result{name and f' {name!r}'} with one row for each of this rank's {rows} samples, "
                f"found shape {list(tensor.shape)}"
            )

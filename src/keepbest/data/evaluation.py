"""The evaluation of a dataset on all ranks: which rank gets which samples, and the loader that delivers them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler

from keepbest.data.container import DataContainer


def evaluation_indices(length: int, *, rank: int, world_size: int) -> list[int]:
    """Return the samples that `rank` evaluates: every `world_size`-th, so that they interleave to the dataset's order.

    Every rank gets the same number of them, because a sharded model needs all ranks at every forward pass. If
    `world_size` does not divide `length`, the last ones are repetitions, which `gather_in_dataset_order` drops.
    """
    return list(_sampler(length, rank=rank, world_size=world_size))


class EvaluationLoader:
    """Delivers this rank's batches of one dataset, in order, independently of the training loader. **Rank-local**.

    Args:
        data_container: Datasets.
        dataset_key: Key of the dataset to evaluate.
        batch_size: Number of samples of a batch on one rank.
        rank: Rank of this process.
        world_size: Number of ranks.

    Attributes:
        batch_size: Number of samples of a batch on one rank.

    Raises:
        ConfigError: If there is no such dataset.
    """

    def __init__(
        self, data_container: DataContainer, dataset_key: str, *, batch_size: int, rank: int, world_size: int
    ) -> None:
        dataset = data_container.get_dataset(dataset_key)
        self.batch_size = batch_size
        self._loader: DataLoader[Any] = DataLoader(
            dataset,  # type: ignore[arg-type]  # any map-style dataset will do
            batch_size=batch_size,
            sampler=_sampler(len(dataset), rank=rank, world_size=world_size),
            collate_fn=data_container.get_collator(dataset_key),
            num_workers=data_container.num_workers,
            persistent_workers=data_container.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # An iterator draws a seed for its workers. It must not draw it from the global generator, or evaluations on
            # a new best would change the training that follows.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)


def _sampler(length: int, *, rank: int, world_size: int) -> DistributedSampler[Any]:
    samples: Any = range(length)  # only its length is used
    return DistributedSampler(samples, num_replicas=world_size, rank=rank, shuffle=False)

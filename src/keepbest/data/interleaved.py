"""One loader for training and for the evaluations between its updates.

Batches of both come from one `DataLoader`, so that its workers load the evaluation batches while training still
processes its last ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from keepbest.data.container import DataContainer
from keepbest.data.evaluation import evaluation_indices
from keepbest.errors import ConfigError
from keepbest.interval import Interval


@dataclass(frozen=True, slots=True)
class SamplerConfig:
    """An evaluation that takes its batches from the training loader.

    Attributes:
        dataset_key: Key of the dataset that is evaluated.
        interval: Interval of the evaluation.
        batch_size: Number of samples of a batch on one rank; `None` takes as many as in a training micro-batch.
    """

    dataset_key: str
    interval: Interval
    batch_size: int | None = None


class BatchRequest(NamedTuple):
    """The samples that make a batch.

    Attributes:
        dataset_key: Key of the dataset.
        indices: Numbers of the samples.
    """

    dataset_key: str
    indices: list[int]


class InterleavedSampler(Sampler[BatchRequest]):
    """The batches of one rank: for every update its micro-batches, then those of the evaluations that are due.

    A permutation of the training set, made from seed and epoch, is cut into global batches of `effective_batch_size`
    samples. Samples that do not fill the last one are left out in that epoch. A rank takes every `world_size`-th sample
    of a global batch. So the samples of an update depend neither on the number of ranks nor on the accumulation.

    After an update come the evaluations with intervals of updates and samples, then those with intervals of epochs,
    each in the order of `configs`. This is the order in which the hooks `after_update` and `after_epoch` consume them.

    All of it is **rank-local**.

    Args:
        data_container: Datasets.
        train_key: Key of the dataset to train on.
        batch_size: Number of samples of a micro-batch on one rank.
        accumulation_steps: Number of micro-batches in an update.
        configs: Evaluations.
        rank: Rank of this process.
        world_size: Number of ranks.
        seed: Seed of the permutations. The same on every rank.
        start_update: Number of updates that were completed before. Their batches are skipped without being loaded.
        end_update: Number of updates that are completed at the end.

    Raises:
        ConfigError: If the training set is smaller than the effective batch, or a key names no dataset.
    """

    def __init__(
        self,
        data_container: DataContainer,
        *,
        train_key: str,
        batch_size: int,
        accumulation_steps: int = 1,
        configs: Sequence[SamplerConfig] = (),
        rank: int,
        world_size: int,
        seed: int,
        start_update: int = 0,
        end_update: int,
    ) -> None:
        self.data_container, self.train_key = data_container, train_key
        self.batch_size, self.accumulation_steps = batch_size, accumulation_steps
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.start_update, self.end_update = start_update, end_update
        self.effective_batch_size = batch_size * accumulation_steps * world_size
        self.updates_per_epoch = count_updates_per_epoch(
            data_container, train_key, effective_batch_size=self.effective_batch_size
        )
        self._train_length = len(data_container.get_dataset(train_key))
        by_call_order = sorted(configs, key=lambda config: config.interval.kind == "epoch")
        self._evaluations = [(config.interval, self._requests(config)) for config in by_call_order]

    def __iter__(self) -> Iterator[BatchRequest]:
        epoch, permutation = -1, torch.empty(0, device="cpu")
        for update in range(self.start_update, self.end_update):
            if update // self.updates_per_epoch != epoch:
                epoch = update // self.updates_per_epoch
                permutation = torch.randperm(
                    self._train_length, generator=torch.Generator().manual_seed(self.seed + epoch), device="cpu"
                )
            start = update % self.updates_per_epoch * self.effective_batch_size
            mine = permutation[start : start + self.effective_batch_size][self.rank :: self.world_size].tolist()
            yield from _cut(self.train_key, mine, self.batch_size)
            for requests in self._due_after(update + 1):
                yield from requests

    def __len__(self) -> int:
        updates = range(self.start_update + 1, self.end_update + 1)
        evaluations = sum(len(requests) for update in updates for requests in self._due_after(update))
        return len(updates) * self.accumulation_steps + evaluations

    def _due_after(self, update: int) -> Iterator[list[BatchRequest]]:
        for interval, requests in self._evaluations:
            if interval.is_due(
                update=update,
                updates_per_epoch=self.updates_per_epoch,
                effective_batch_size=self.effective_batch_size,
            ):
                yield requests

    def _requests(self, config: SamplerConfig) -> list[BatchRequest]:
        length = len(self.data_container.get_dataset(config.dataset_key))
        indices = evaluation_indices(length, rank=self.rank, world_size=self.world_size)
        return _cut(config.dataset_key, indices, config.batch_size or self.batch_size)


def count_updates_per_epoch(data_container: DataContainer, train_key: str, *, effective_batch_size: int) -> int:
    """Count the full effective batches of the training set. **Rank-local**.

    Raises:
        ConfigError: If it has none, or there is no such dataset.
    """
    length = len(data_container.get_dataset(train_key))
    if length < effective_batch_size:
        raise ConfigError(
            f"the training set {train_key!r} has {length} samples, fewer than the effective batch of "
            f"{effective_batch_size} (over all ranks and accumulation steps); choose a smaller batch or fewer ranks"
        )
    return length // effective_batch_size


def build_loader(sampler: InterleavedSampler) -> DataLoader[Any]:
    """Make the loader that delivers the batches that `sampler` requests, collated, in its order. **Rank-local**."""
    container = sampler.data_container
    # The global generator stays as it is. Ranks and resumed runs get workers with seeds of their own.
    worker_seed = sampler.seed + sampler.rank + sampler.world_size * sampler.start_update
    return DataLoader(
        _RequestedBatches(container),
        batch_size=None,
        sampler=sampler,
        collate_fn=_as_it_is,
        num_workers=container.num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(worker_seed),
    )


class _RequestedBatches(Dataset[Any]):
    """Batches by request, so that one `DataLoader` can serve several datasets with their own collators."""

    def __init__(self, data_container: DataContainer) -> None:
        self._data_container = data_container

    def __getitem__(self, request: BatchRequest) -> Any:
        return self._data_container.load_batch(request.dataset_key, request.indices)


def _cut(dataset_key: str, indices: list[int], size: int) -> list[BatchRequest]:
    return [BatchRequest(dataset_key, indices[start : start + size]) for start in range(0, len(indices), size)]


def _as_it_is(batch: Any) -> Any:
    return batch

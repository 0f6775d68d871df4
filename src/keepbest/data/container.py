"""`DataContainer`: the datasets of a run, and how their samples become batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch.utils.data import default_collate

from keepbest.errors import ConfigError

Collator = Callable[[list[Any]], Any]


class MapDataset(Protocol):
    """A dataset with a length, whose samples have numbers. It must be the same on every rank."""

    def __getitem__(self, index: int, /) -> Any:
        """Return sample number `index`."""

    def __len__(self) -> int:
        """Return the number of samples."""


class DataContainer:
    """The datasets of a run, by key, and how their samples become batches.

    Args:
        datasets: Datasets by key. Training uses one of them, evaluations use the others.
        collators: Functions that make a batch of a list of samples, by key. Other datasets use torch's
            `default_collate`.
        num_workers: Number of processes that load data, for each loader. 0 loads in the training process.

    Attributes:
        num_workers: Number of processes that load data, for each loader.

    Raises:
        ConfigError: If a dataset has no samples or no length, a collator belongs to no dataset, or `num_workers` < 0.
    """

    def __init__(
        self,
        datasets: Mapping[str, MapDataset],
        collators: Mapping[str, Collator] | None = None,
        *,
        num_workers: int = 0,
    ) -> None:
        self._datasets = dict(datasets)
        self._collators = dict(collators or {})
        self.num_workers = num_workers
        for key, dataset in self._datasets.items():
            if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
                raise ConfigError(
                    f"dataset {key!r} is a {type(dataset).__name__}; expected one with __len__ and __getitem__"
                )
            if len(dataset) == 0:
                raise ConfigError(f"dataset {key!r} has no samples")
        if unknown := sorted(self._collators.keys() - self._datasets.keys()):
            raise ConfigError(f"there are collators for {unknown}, but the datasets are {self.keys}")
        if num_workers < 0:
            raise ConfigError(f"num_workers must be >= 0, found {num_workers}")

    @property
    def keys(self) -> list[str]:
        """The keys of all datasets, in their order."""
        return list(self._datasets)

    def get_dataset(self, key: str) -> MapDataset:
        """Return the dataset with that key.

        Raises:
            ConfigError: If there is none. It lists the keys that exist.
        """
        if key not in self._datasets:
            raise ConfigError(f"there is no dataset {key!r}; the datasets are {self.keys}")
        return self._datasets[key]

    def get_collator(self, key: str) -> Collator:
        """Return the function that makes a batch of a list of samples of that dataset.

        Raises:
            ConfigError: If there is no such dataset.
        """
        self.get_dataset(key)
        return self._collators.get(key, default_collate)

    def load_batch(self, key: str, indices: Sequence[int]) -> Any:
        """Load the batch of these samples of that dataset. Errors of the dataset are raised as they are.

        Raises:
            ConfigError: If there is no such dataset.
        """
        dataset = self.get_dataset(key)
        # torch's convention for datasets that are faster at many samples at once.
        load_many: Callable[[list[int]], list[Any]] | None = getattr(dataset, "__getitems__", None)
        samples = [dataset[index] for index in indices] if load_many is None else load_many(list(indices))
        return self.get_collator(key)(samples)

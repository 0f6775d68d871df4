"""Callbacks that evaluate the model on a whole dataset, divided among the ranks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from keepbest.callbacks.config import CallBackBaseConfig
from keepbest.callbacks.periodic import PeriodicCallback
from keepbest.data.device import move_to_device
from keepbest.data.evaluation import EvaluationLoader
from keepbest.data.gather import Results, gather_in_dataset_order
from keepbest.data.interleaved import SamplerConfig
from keepbest.interval import IntervalType

if TYPE_CHECKING:
    from keepbest.training.counter import UpdateCounter


class PeriodicDataIteratorCallbackConfig(CallBackBaseConfig):
    """Config of a callback that evaluates a dataset.

    Attributes:
        dataset_key: Key of the dataset.
    """

    dataset_key: str


class PeriodicDataIteratorCallback(PeriodicCallback):
    """Runs a dataset through the model and merges the ranks' results.

    A subclass defines what is computed for a batch (`process_data`) and what is done with the results of all samples
    (`process_results`). The results do not depend on the number of ranks.

    Attributes:
        dataset_key: Key of the dataset.

    Raises:
        ConfigError: If there is no dataset with that key.
    """

    def __init__(self, callback_config: PeriodicDataIteratorCallbackConfig, **kwargs: Any) -> None:
        super().__init__(callback_config, **kwargs)
        self.dataset_key = callback_config.dataset_key
        self._dataset_length = len(self.data_container.get_dataset(self.dataset_key))
        self._loader: EvaluationLoader | None = None

    @property
    def state_key_details(self) -> list[str]:
        return [self.dataset_key, *super().state_key_details]

    @property
    def sampler_config(self) -> SamplerConfig:
        """The config by which `InterleavedSampler` delivers this callback's batches."""
        return SamplerConfig(self.dataset_key, self.interval, self.callback_config.batch_size)

    @abstractmethod
    def process_data(self, batch: Any) -> Results:
        """Compute the results for one batch: a tensor or a dict of tensors, of shape `[samples of the batch, ...]`.

        Every rank calls it equally often, with a batch on the model's device, in eval mode and without gradients. An
        error on one rank is raised on all.
        """

    @abstractmethod
    def process_results(self, results: Results, *, interval_type: IntervalType, update_counter: UpdateCounter) -> None:
        """Use the results of the whole dataset.

        Work that can fail on one rank only, such as writing a file, belongs into `self.ranks.agree`.

        Args:
            results: Results of all samples, in the order of the dataset, the same on every rank. CPU tensors of shape
                `[samples of the dataset, ...]`.
            interval_type: Kind of the interval that has ended; "eval" if it was called on demand.
            update_counter: Counter of the completed updates.
        """

    def periodic_callback(
        self,
        *,
        interval_type: IntervalType,
        update_counter: UpdateCounter,
        batch_size: int,
        data_iter: Iterator[Any] | None = None,
        **_kwargs: Any,
    ) -> None:
        """Evaluate the dataset. **Collective**.

        Raises:
            KeepBestError: On every rank, if a rank failed. See `gather_in_dataset_order`.
        """
        batch_size = self.callback_config.batch_size or batch_size
        results = gather_in_dataset_order(
            f"evaluate dataset {self.dataset_key!r} in {type(self).__name__}",
            lambda: self._process_batches(batch_size, data_iter),
            dataset_length=self._dataset_length,
            ranks=self.ranks,
        )
        self.process_results(results, interval_type=interval_type, update_counter=update_counter)

    def _process_batches(self, batch_size: int, data_iter: Iterator[Any] | None) -> Results:
        samples = -(-self._dataset_length // self.ranks.world_size)
        count = -(-samples // batch_size)
        batches = self._own_loader(batch_size) if data_iter is None else islice(data_iter, count)
        device = _device_of(self.model)
        with _evaluating(self.model):
            results = [_to_cpu(self.process_data(move_to_device(batch, device))) for batch in batches]
        if len(results) != count:
            raise RuntimeError(f"the data iterator ended after {len(results)} of {count} evaluation batches")
        return _merge_batches(results)

    def _own_loader(self, batch_size: int) -> EvaluationLoader:
        if self._loader is None or self._loader.batch_size != batch_size:
            self._loader = EvaluationLoader(
                self.data_container,
                self.dataset_key,
                batch_size=batch_size,
                rank=self.ranks.rank,
                world_size=self.ranks.world_size,
            )
        return self._loader


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    # Module by module, because a frozen submodel may be in eval mode while the others train.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _device_of(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _to_cpu(results: Results) -> Results:
    return results.cpu() if isinstance(results, Tensor) else {name: part.cpu() for name, part in results.items()}


def _merge_batches(results: list[Results]) -> Results:
    if isinstance(results[0], Tensor):
        return _concatenate(cast("list[Tensor]", results))
    named = cast("list[dict[str, Tensor]]", results)
    return {name: _concatenate([part[name] for part in named]) for name in named[0]}


def _concatenate(parts: list[Tensor]) -> Tensor:
    # One number for a batch, such as its mean loss, becomes one row. The number of rows then reveals the mistake.
    return torch.cat([torch.atleast_1d(part) for part in parts])  # type: ignore[no-untyped-call]

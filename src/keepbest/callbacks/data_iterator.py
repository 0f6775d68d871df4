"""Callbacks that evaluate the model on a whole dataset, shared out among the ranks."""

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
        dataset_key: the dataset.
    """

    dataset_key: str


class PeriodicDataIteratorCallback(PeriodicCallback):
    """Runs a dataset through the model and puts the ranks' results together.

    A subclass says what is computed for a batch (`process_data`) and what is done with the results of all samples
    (`process_results`), which do not depend on the number of ranks.

    Raises:
        ConfigError: if there is no dataset of that key.
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
        """What `InterleavedSampler` needs in order to deliver this callback's batches."""
        return SamplerConfig(self.dataset_key, self.interval, self.callback_config.batch_size)

    @abstractmethod
    def process_data(self, batch: Any) -> Results:
        """The results for one batch: a tensor or a dict of tensors, of shape `[samples of the batch, ...]`.

        Runs on every rank equally often, on the model's device, in eval mode and without gradients. What it raises on
        one rank is raised on all.
        """

    @abstractmethod
    def process_results(self, results: Results, *, interval_type: IntervalType, update_counter: UpdateCounter) -> None:
        """Use the results of the whole dataset.

        Called on every rank with the same `results`: CPU tensors of shape `[samples of the dataset, ...]`, in the
        dataset's order. What can fail on one rank only, such as writing a file, belongs into `self.ranks.agree`.
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
        return _concatenate(results)

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


def _concatenate(results: list[Results]) -> Results:
    if isinstance(results[0], Tensor):
        return _stack_rows(cast("list[Tensor]", results))
    named = cast("list[dict[str, Tensor]]", results)
    return {name: _stack_rows([part[name] for part in named]) for name in named[0]}


def _stack_rows(parts: list[Tensor]) -> Tensor:
    # One number for a batch, such as its mean loss, becomes a row, so that the number of rows tells the mistake.
    return torch.cat([torch.atleast_1d(part) for part in parts])  # type: ignore[no-untyped-call]

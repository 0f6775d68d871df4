"""`OfflineLossCallback`: the model's losses on a whole dataset."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from torch import Tensor

from keepbest.callbacks.data_iterator import PeriodicDataIteratorCallback, PeriodicDataIteratorCallbackConfig
from keepbest.data.gather import Results
from keepbest.errors import ConfigError
from keepbest.interval import IntervalType
from keepbest.modules.wrappers import unwrap

if TYPE_CHECKING:
    from keepbest.training.counter import UpdateCounter


class OfflineLossCallbackConfig(PeriodicDataIteratorCallbackConfig):
    """Config of `OfflineLossCallback`."""

    name: Literal["OfflineLossCallback"] = "OfflineLossCallback"


class OfflineLossCallback(PeriodicDataIteratorCallback):
    """Logs `loss/<dataset_key>/<name>` for each of the model's losses: its mean over the samples of the dataset.

    The mean is computed in float64 from a sum without rounding errors, so it does not depend on the number of ranks. It
    is logged on every rank, without a weight.

    Raises:
        ConfigError: If the model has no method `losses`, or there is no dataset with that key.
    """

    config_class: ClassVar[type[OfflineLossCallbackConfig]] = OfflineLossCallbackConfig

    def __init__(self, callback_config: OfflineLossCallbackConfig, **kwargs: Any) -> None:
        super().__init__(callback_config, **kwargs)
        # DDP and FSDP hide the method. They are only needed for the forward pass.
        inner = unwrap(self.model)
        losses: Callable[..., dict[str, Tensor]] | None = getattr(inner, "losses", None)
        if losses is None:
            raise ConfigError(
                "OfflineLossCallback needs a model with a method losses(outputs, batch); "
                f"{type(inner).__name__} has none"
            )
        self._losses = losses

    def process_data(self, batch: Any) -> Results:
        """Compute the losses of each sample: name -> tensor of shape `[samples of the batch]`."""
        return self._losses(self.model(batch), batch)

    def process_results(self, results: Results, *, interval_type: IntervalType, update_counter: UpdateCounter) -> None:
        del interval_type, update_counter
        for name, losses in cast("dict[str, Tensor]", results).items():
            self.log_writer.add_scalar(f"loss/{self.dataset_key}/{name}", _mean(losses))


def _mean(losses: Tensor) -> float:
    values = losses.double().tolist()
    # fsum refuses infinities of both signs, whose plain sum is NaN.
    total = math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
    return total / len(values)

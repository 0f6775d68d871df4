"""One update of the weights: micro-batches forward and backward, then a step of every optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from keepbest.data.device import move_to_device
from keepbest.errors import ConfigError
from keepbest.models import Model
from keepbest.training.average import Average
from keepbest.training.strategy import Precision, autocast, clip_gradients, take_step, without_gradient_sync


@dataclass(frozen=True, slots=True)
class UpdateStep:
    """Updates the weights of a model.

    Attributes:
        model: Model as wrapped by the strategy.
        unwrapped: Model itself, which knows its losses.
        optimizers: Optimizers by submodel.
        schedules: Schedules of the learning rates, by submodel.
        clip_grad_norm: Largest norm of all gradients; `None` for any.
        average: Moving average of the weights; `None` if there is none.
        accumulation_steps: Number of micro-batches in one update.
        batch_size: Number of samples of a micro-batch on one rank.
        precision: Precision of the computation.
        device: Device of the model.
    """

    model: nn.Module
    unwrapped: Model
    optimizers: Mapping[str, Optimizer]
    schedules: Mapping[str, LRScheduler]
    clip_grad_norm: float | None
    average: Average | None
    accumulation_steps: int
    batch_size: int
    precision: Precision
    device: torch.device

    def compute(self, data_iter: Iterator[Any], track: Callable[..., None]) -> dict[str, Tensor]:
        """Compute the gradients of one update. **Collective** as the strategy is.

        Args:
            data_iter: Iterator that delivers the micro-batches next.
            track: Called after each micro-batch with `batch`, `losses` and `accumulation_step`.

        Returns:
            The losses of this rank's samples, by name.

        Raises:
            ConfigError: If the model's losses lack `total` or do not have one value for each sample.
        """
        steps = [self._accumulate(next(data_iter), step, track) for step in range(self.accumulation_steps)]
        return {name: torch.cat([losses[name] for losses in steps]) for name in steps[0]}

    def apply(self) -> None:
        """Change the weights by the gradients. **Collective** as the strategy is.

        Raises:
            ConfigError: If a schedule has no further step.
        """
        if self.clip_grad_norm is not None:
            clip_gradients(self.model, self.clip_grad_norm)
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for name, schedule in self.schedules.items():
            take_step(name, schedule)
        if self.average is not None:
            self.average.update(self.model)

    def _accumulate(self, batch: Any, step: int, track: Callable[..., None]) -> dict[str, Tensor]:
        batch = move_to_device(batch, self.device)
        is_last = step == self.accumulation_steps - 1
        with nullcontext() if is_last else without_gradient_sync(self.model):
            with autocast(self.precision, self.device):
                losses = self.unwrapped.losses(self.model(batch), batch)
            total = _total(losses, self.batch_size)
            torch.autograd.backward(total.mean() / self.accumulation_steps)
        losses = {name: loss.detach() for name, loss in losses.items()}
        track(batch=batch, losses=losses, accumulation_step=step)
        return losses


def _total(losses: dict[str, Tensor], batch_size: int) -> Tensor:
    if "total" not in losses:
        raise ConfigError(f"the model's losses must contain 'total', found {sorted(losses)}")
    for name, loss in losses.items():
        if loss.shape != (batch_size,):
            raise ConfigError(
                f"the model's losses must have one value for each of the {batch_size} samples of a batch; "
                f"{name!r} has shape {tuple(loss.shape)}"
            )
    return losses["total"]

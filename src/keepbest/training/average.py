"""`Average`: the exponential moving average of the weights in training."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from keepbest.models import Model
from keepbest.training.strategy import Precision, StrategyName, expect_new_weights, place_for_evaluation


class Average:
    """Averages the weights of a model, in a copy that the ranks share as they share the model.

    The first update copies the weights. Each later one makes a weight `decay` of itself and `1 - decay` of the one in
    training. Buffers are copied from the model in training, because many of them count or are averages already.

    The constructor is **collective**.

    Args:
        model: Model before `place`, because sharded weights cannot be copied.
        decay: Share of the average that stays at each update, > 0 and < 1.
        strategy: Strategy of the model in training.
        precision: Precision of the model in training.
        device: Device of the model in training.

    Attributes:
        model: Copy with the averaged weights, as wrapped by the strategy.
    """

    def __init__(
        self, model: Model, decay: float, *, strategy: StrategyName, precision: Precision, device: torch.device
    ) -> None:
        averaging = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self._averaged = AveragedModel(model, multi_avg_fn=averaging)
        copy = cast("Model", self._averaged.module)
        self.model = place_for_evaluation(copy, strategy, precision=precision, device=device)
        self._averaged.module = self.model

    def update(self, model: nn.Module) -> None:
        """Add the weights of `model` to the average. **Rank-local**.

        Args:
            model: Model in training, as wrapped by the strategy, after an update.
        """
        expect_new_weights(self.model)
        self._averaged.update_parameters(model)
        # Frozen weights may be left out of snapshots, so the copy must be frozen where the model is.
        for averaged, parameter in zip(self.model.parameters(), model.parameters(), strict=True):
            if averaged.requires_grad != parameter.requires_grad:
                averaged.requires_grad_(parameter.requires_grad)

    def state_dict(self) -> dict[str, int]:
        """What is needed to resume, in addition to the weights of `model`. **Rank-local**."""
        return {"updates": int(self._averaged.n_averaged)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from `state_dict`. **Rank-local**."""
        self._averaged.n_averaged.fill_(state_dict["updates"])


def build_average(
    model: Model, decay: float | None, *, strategy: StrategyName, precision: Precision, device: torch.device
) -> Average | None:
    """Make the `Average` of a model; `None` without a `decay`. **Collective**."""
    if decay is None:
        return None
    return Average(model, decay, strategy=strategy, precision=precision, device=device)

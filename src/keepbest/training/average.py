"""`Average`: the exponential moving average of the weights in training."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from keepbest.models import Model
from keepbest.training.strategy import Precision, StrategyName, expect_new_weights, place_for_evaluation


class Average:
    """Averages the weights of a model, in a copy that is shared among the ranks as the model is.

    The first update copies the weights; each further one makes a weight `decay` of itself and `1 - decay` of the one in
    training. Buffers are copied from the model in training: many count, or are averages already.

    Making one is **collective**.

    Args:
        model: as it is before `place`, since what is sharded cannot be copied.
        decay: > 0 and < 1.
        strategy, precision, device: of the model in training.

    Attributes:
        model: the averaged weights, as wrapped by the strategy.
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
        """Take in the weights of `model`, as wrapped by the strategy, after an update of it. **Rank-local**."""
        expect_new_weights(self.model)
        self._averaged.update_parameters(model)
        # What is frozen by now tells what need not be saved.
        for averaged, parameter in zip(self.model.parameters(), model.parameters(), strict=True):
            if averaged.requires_grad != parameter.requires_grad:
                averaged.requires_grad_(parameter.requires_grad)

    def state_dict(self) -> dict[str, int]:
        """What is needed to go on beside the weights of `model`. **Rank-local**."""
        return {"updates": int(self._averaged.n_averaged)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from `state`. **Rank-local**."""
        self._averaged.n_averaged.fill_(state["updates"])

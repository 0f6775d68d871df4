"""`Model`: a module that also computes its losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn


class Model(nn.Module, ABC):
    """A module with its losses. The trainer minimizes the mean of the loss called `total`.

    Outputs and losses are separate steps because DDP and FSDP act on `forward` only. `losses` is called on the
    unwrapped model and must not use its parameters.
    """

    @abstractmethod
    def forward(self, batch: Any) -> dict[str, Tensor]:
        """Compute the outputs for one collated batch, as named tensors with the samples along dim 0."""

    @abstractmethod
    def losses(self, outputs: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
        """Compute the losses of each sample: name -> floating tensor of shape [batch]. `total` must be one of them."""

    @property
    def is_frozen(self) -> bool:
        """Whether no parameter requires grad at this moment. **Rank-local**."""
        return not any(parameter.requires_grad for parameter in self.parameters())

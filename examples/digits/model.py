"""A network that names a digit, and draws it again."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from keepbest.models import CompositeModel

_PIXELS, _DIGITS = 64, 10


class DigitsModel(CompositeModel):
    """Encoder, decoder and classifier; the classifier sees the code only, so it can be kept without the decoder.

    Args:
        hidden: width of the layers between.
        code: width of what the encoder makes of an image.
        reconstruction_weight: of the decoder's error in the total loss.
    """

    def __init__(self, hidden: int = 64, code: int = 16, reconstruction_weight: float = 1.0) -> None:
        super().__init__(
            {
                "encoder": _two_layers(_PIXELS, hidden, code),
                "decoder": _two_layers(code, hidden, _PIXELS),
                "classifier": _two_layers(code, hidden, _DIGITS),
            }
        )
        self._reconstruction_weight = reconstruction_weight

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Images [batch, 64] -> `image` [batch, 64] and `logits` [batch, 10]."""
        code = self.encoder(batch["image"])
        return {"image": self.decoder(code), "logits": self.classifier(code)}

    def losses(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy of the digit and mean squared error of the pixels, for each sample."""
        classification = functional.cross_entropy(outputs["logits"], batch["label"], reduction="none")
        reconstruction = (outputs["image"] - batch["image"]).square().mean(1)
        return {
            "classification": classification,
            "reconstruction": reconstruction,
            "total": classification + self._reconstruction_weight * reconstruction,
        }


def _two_layers(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))

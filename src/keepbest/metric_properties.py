"""Which direction of a metric is better, known from its name."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from keepbest.errors import ConfigError

LOWER_IS_BETTER = (
    "*loss*", "*error*", "*perplexity*", "*ppl*", "*mse*", "*rmse*", "*mae*", "*mape*", "*nll*", "*bpb*", "*wer*",
    "*cer*", "*fid*", "*distance*", "*divergence*", "*regret*",
)  # fmt: skip
HIGHER_IS_BETTER = (
    "*accuracy*", "*acc", "*acc[0-9]*", "*auc*", "*auroc*", "*f1*", "*precision*", "*recall*", "*iou*", "*dice*",
    "*map", "*bleu*", "*rouge*", "*psnr*", "*ssim*", "*r2*", "*reward*", "*return*", "*likelihood*", "*correlation*",
)  # fmt: skip


class MetricPropertyProvider:
    """Says for a metric key whether higher is better, from patterns over its parts.

    The parts of a key (between slashes) are asked from the last to the first, without regard to case, so
    `loss/val/accuracy` is an accuracy. A part that patterns of both directions match answers nothing.

    Args:
        lower_is_better: further patterns (as in `fnmatch`), beside the built-in ones.
        higher_is_better: likewise.
    """

    def __init__(self, *, lower_is_better: Sequence[str] = (), higher_is_better: Sequence[str] = ()) -> None:
        self._lower = (*LOWER_IS_BETTER, *lower_is_better)
        self._higher = (*HIGHER_IS_BETTER, *higher_is_better)

    def higher_is_better(self, metric_key: str) -> bool:
        """Whether a higher value of `metric_key` is better. **Rank-local**.

        Raises:
            ConfigError: if no pattern, or patterns of both directions, match: a guess could keep the worst model.
        """
        for part in reversed(metric_key.lower().split("/")):
            lower = any(fnmatchcase(part, pattern.lower()) for pattern in self._lower)
            higher = any(fnmatchcase(part, pattern.lower()) for pattern in self._higher)
            if lower != higher:
                return higher
        raise ConfigError(
            f"it is not known whether a higher {metric_key!r} is better; "
            "set higher_is_better to true or false, or add a pattern to MetricPropertyProvider"
        )

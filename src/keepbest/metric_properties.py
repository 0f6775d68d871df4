"""The direction in which a metric is better, derived from its name."""

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
    """Derives from a metric key whether higher is better, by patterns over its parts.

    The parts of a key (between slashes) are matched from the last to the first, without regard to case, so
    `loss/val/accuracy` is an accuracy. A part that matches patterns of both directions decides nothing.

    Args:
        lower_is_better: Patterns (as in `fnmatch`) in addition to the built-in ones.
        higher_is_better: Patterns in addition to the built-in ones.
    """

    def __init__(self, *, lower_is_better: Sequence[str] = (), higher_is_better: Sequence[str] = ()) -> None:
        self._lower = (*LOWER_IS_BETTER, *lower_is_better)
        self._higher = (*HIGHER_IS_BETTER, *higher_is_better)

    def higher_is_better(self, metric_key: str) -> bool:
        """Whether a higher value of `metric_key` is better. **Rank-local**.

        Raises:
            ConfigError: If no part decides. A guess could keep the worst model.
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

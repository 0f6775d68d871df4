"""The settings of a keeper as keyword arguments, for editors and type checkers. It imports no pydantic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

from keepbest.formats.registry import FormatName
from keepbest.reduction import MetricReduction


class KeeperSettingsDict(TypedDict, total=False):
    """Types of the settings, equal to those of `KeeperSettings`. What each of them does is described there."""

    tolerances: Sequence[int] | None
    model_names: Sequence[str] | None
    save_frozen_weights: bool
    higher_is_better: bool | None
    min_delta: float
    baseline: float | None
    keep_top_k: int
    metric_reduction: MetricReduction
    on_nonfinite: Literal["ignore", "raise"]
    format: FormatName
    async_save: bool
    staging_device_share: float
    on_save_error: Literal["raise", "warn"]
    id: str | None
    remote: str | None
    rank_timeout: float
    save_timeout: float
    resume: Literal["ledger"] | None
    existing: Literal["refuse", "set_aside"]

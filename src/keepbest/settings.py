"""The settings of a keeper, checked as a whole before any work starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

from torch import nn

from keepbest.decision import Policy
from keepbest.errors import ConfigError
from keepbest.formats.registry import FormatName, check_format
from keepbest.metric import MetricReduction, check_reduction
from keepbest.metric_properties import MetricPropertyProvider
from keepbest.modules.parts import Part, select_parts
from keepbest.remote.storage import check_local, check_remote


class KeeperSettings(TypedDict, total=False):
    """Keyword arguments of `BestKeeper` that mean the same wherever it is used; described there."""

    tolerances: Sequence[int] | None
    model_names: Sequence[str] | None
    save_frozen_weights: bool
    min_delta: float
    keep_top_k: int
    metric_reduction: MetricReduction
    on_nonfinite: Literal["ignore", "raise"]
    format: FormatName
    async_save: bool
    on_save_error: Literal["raise", "warn"]
    id: str | None
    remote: str | None
    resume: Literal["ledger"] | None
    rank_timeout: float
    save_timeout: float


def check_names(settings: Mapping[str, object]) -> None:
    """See whether `settings` has the names of `KeeperSettings` only. **Rank-local**.

    Raises:
        ConfigError: if not; lists those that there are.
    """
    known = KeeperSettings.__optional_keys__
    if unknown := settings.keys() - known:
        raise ConfigError(f"there is no setting {', '.join(sorted(unknown))}; there are: {', '.join(sorted(known))}")


@dataclass(frozen=True, slots=True)
class Settings:
    """What `BestKeeper` was given, as far as all ranks must have been given the same.

    Attributes:
        name: of the keeper, which is that of its ref on the best.
        policy: by which it decides.
        reduction: how the values of the ranks become one.
        parts: of the model, that are saved.
        save_frozen_weights: whether parameters that do not require grad are saved.
        on_nonfinite: whether NaN and infinities are no improvement, or an error.
        on_save_error: whether a save that fails is an error, or training goes on.
        file_format: of the snapshots.
        async_save: whether they are written in the background.
        remote: URL of a copy of the run.
    """

    name: str
    policy: Policy
    reduction: MetricReduction
    parts: tuple[Part, ...]
    save_frozen_weights: bool
    on_nonfinite: str
    on_save_error: str
    file_format: FormatName
    async_save: bool
    remote: str | None


def check_settings(
    model: nn.Module,
    *,
    name: str,
    directory: str | Path,
    metric_key: str,
    tolerances: Sequence[int] | None,
    model_names: Sequence[str] | None,
    save_frozen_weights: bool,
    higher_is_better: bool | None,
    min_delta: float,
    metric_reduction: str,
    keep_top_k: int,
    on_nonfinite: str,
    file_format: str,
    async_save: bool,
    on_save_error: str,
    remote: str | None,
    resume: str | None,
    metric_property_provider: MetricPropertyProvider | None,
) -> Settings:
    """The settings of `BestKeeper`, which describes them. **Rank-local**.

    Raises:
        ConfigError: if one of them, or two together, cannot be right.
    """
    for setting, given, known in (
        ("on_nonfinite", on_nonfinite, ("ignore", "raise")),
        ("on_save_error", on_save_error, ("raise", "warn")),
        ("resume", resume, (None, "ledger")),
    ):
        if given not in known:
            raise ConfigError(f"{setting} must be one of {known}, got {given!r}")
    check_local(directory)
    provider = metric_property_provider or MetricPropertyProvider()
    direction = provider.higher_is_better(metric_key) if higher_is_better is None else higher_is_better
    policy = Policy(direction, min_delta, tuple(tolerances or ()), keep_top_k)
    parts = select_parts(model, model_names)
    settings = Settings(
        name=name,
        policy=policy,
        reduction=check_reduction(metric_reduction),
        parts=parts,
        save_frozen_weights=save_frozen_weights,
        on_nonfinite=on_nonfinite,
        on_save_error=on_save_error,
        file_format=check_format(file_format, model, parts),
        async_save=async_save,
        remote=check_remote(remote),
    )
    if async_save and settings.file_format == "dcp":
        raise ConfigError(
            "format 'dcp' is written by all ranks, which wait for each other; async_save goes with 'torch' and "
            "'safetensors' only"
        )
    return settings

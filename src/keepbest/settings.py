"""The settings of a keeper: each is written once, here, and whoever takes settings takes these."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from torch import nn
from typing_extensions import Self

from keepbest.capture.share import Items
from keepbest.capture.states import check_states
from keepbest.decision import Policy
from keepbest.errors import ConfigError
from keepbest.formats.registry import FormatName, check_format
from keepbest.metric_properties import MetricPropertyProvider
from keepbest.modules.parts import select_parts
from keepbest.new_best import Hook, check_hooks, hooks_to_compare
from keepbest.ranks import LONGEST_TIMEOUT
from keepbest.reduction import MetricReduction
from keepbest.remote.storage import check_remote, local_path
from keepbest.run.names import best_ref
from keepbest.settings_dict import KeeperSettingsDict
from keepbest.validation import describe


def _as_list(value: object, *, example: Sequence[object]) -> object:
    # A text is a sequence too, and pydantic says "an instance of Sequence", which is no word of YAML.
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        shown = [value] if type(value) is type(example[0]) else list(example)
        raise PydanticCustomError("list", "Input should be a list such as {shown}", {"shown": repr(shown)})
    return list(value)


def _check_direction(value: object) -> object:
    if value is None or isinstance(value, bool):
        return value
    raise PydanticCustomError(
        "direction", "Input should be true (higher values are better), false (lower values are better) or absent"
    )


def _as_python(value: object) -> object:
    """A scalar or list of numpy or torch, or a list of such scalars, as Python's own; everything else as it is."""
    if type(value) in (list, tuple):
        return [_as_python(each) for each in cast("Sequence[object]", value)]
    is_of_numpy = type(value).__module__ == "numpy" and hasattr(value, "dtype")
    if not is_of_numpy and not isinstance(value, torch.Tensor):
        return value
    try:
        return value.tolist() if value.ndim < 2 else value  # type: ignore[attr-defined]  # of either library
    except (RuntimeError, NotImplementedError):  # a tensor without values is refused as what it is
        return value


def _sorted_if_unique(values: Sequence[int]) -> list[int]:
    if len(set(values)) != len(values):
        raise PydanticCustomError("unique", "Input should be integers that differ from each other")
    return sorted(values)


def _check_name(value: str) -> str:
    if not value.strip():
        raise PydanticCustomError("name", "Input should be a name or absent")
    return value


Seconds = Annotated[float, Field(gt=0, le=LONGEST_TIMEOUT, allow_inf_nan=False, strict=True)]
"""A timeout."""
_Tolerances = Annotated[
    Sequence[Annotated[int, Field(ge=0)]],
    BeforeValidator(partial(_as_list, example=[2, 5])),
    AfterValidator(_sorted_if_unique),
]
Direction = Annotated[bool | None, BeforeValidator(_check_direction)]
_Names = Annotated[Sequence[str], BeforeValidator(partial(_as_list, example=["encoder"])), AfterValidator(list)]
_TIMEOUTS = ("rank_timeout", "save_timeout")


class CommonSettings(BaseModel):
    """The settings that a keeper has wherever it is used. No value is converted to the type of its setting.

    Numbers of numpy and torch are taken as those of Python that they are.

    Raises:
        pydantic.ValidationError: If a setting is unknown or wrong. `KeeperSettings.of` raises `ConfigError` instead.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    tolerances: _Tolerances | None = Field(
        default=None,
        description="Unique integers of at least 0. Each keeps what early stopping would have kept that tolerates this "
        "many intervals in a row without improvement.",
    )
    model_names: _Names | None = Field(
        default=None, description="Names of the submodels to save, dotted for nested ones. `None` saves all of them."
    )
    save_frozen_weights: bool = Field(
        default=True, description="Whether to save parameters that do not require grad at that moment."
    )
    higher_is_better: Direction = Field(
        default=None, description="Direction of the metric. `None` takes it from the name of the metric."
    )
    min_delta: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Difference to the old best, in units of the metric, that a new best must exceed.",
    )
    baseline: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="Value that is known from elsewhere, which the first best must beat too, by more than `min_delta`. "
        "`None` takes any.",
    )
    keep_top_k: int = Field(
        default=1,
        gt=0,
        description="Number of the best values that keep their weights, each with a ref. 1 is the best alone.",
    )
    metric_reduction: MetricReduction = Field(default="mean", description="How the values of the ranks become one.")
    on_nonfinite: Literal["ignore", "raise"] = Field(
        default="ignore", description="Whether NaN and infinities count as intervals without improvement, or raise."
    )
    format: FormatName = Field(
        default="torch",
        description="Format of the snapshots: one file for each part, written by `torch.save` or safetensors, or "
        "`dcp`, a folder of torch's distributed checkpoints, to which every rank writes its share.",
    )
    async_save: bool = Field(
        default=False,
        description="Whether training continues as soon as the weights are copied, while a thread writes them. The "
        "next call of the keeper raises what the thread fails at.",
    )
    staging_device_share: float = Field(
        default=0.5,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="With `async_save` on CUDA devices, the share of the free memory of a device that a copy of the "
        "weights may take, for this best and the next. Where it does not suffice, training waits for the host.",
    )
    on_save_error: Literal["raise", "warn"] = Field(
        default="raise",
        description="Whether a save that fails raises, or only costs that best, so that training continues with the "
        "last one on the disk as the best to beat.",
    )
    id: Annotated[str, AfterValidator(_check_name)] | None = Field(
        default=None, description="Name that distinguishes this keeper from others of the same metric."
    )
    remote: str | None = Field(
        default=None,
        description="URL that fsspec knows, like `s3://bucket/runs/a`, where a copy of the run follows each commit in "
        "the background.",
    )
    rank_timeout: Seconds = Field(default=120.0, description="Seconds that ranks wait for each other.")
    save_timeout: Seconds = Field(default=1800.0, description="Seconds that ranks wait for rank 0 to write.")

    @model_validator(mode="before")
    @classmethod
    def _take_numbers_of_libraries(cls, settings: Any) -> Any:
        if not isinstance(settings, dict):
            return settings
        return {name: _as_python(value) for name, value in settings.items()}

    def keeper_arguments(self) -> KeeperSettingsDict:
        """These settings as keyword arguments of `BestKeeper`. **Rank-local**."""
        names = [name for name in KeeperSettings.model_fields if name in type(self).model_fields]
        return cast("KeeperSettingsDict", {name: getattr(self, name) for name in names})


class KeeperSettings(CommonSettings):
    """The settings of `BestKeeper` and of the adapters, where the loop or the framework says when a run is resumed."""

    resume: Literal["ledger"] | None = Field(
        default=None,
        description="`ledger` resumes what the folder of the run holds. `None` needs an empty folder, or a state that "
        "was loaded.",
    )

    existing: Literal["refuse", "set_aside"] = Field(
        default="refuse",
        description="What happens to a run in the folder that is not resumed: an error, or `set_aside` moves it to a "
        "free directory beside this one, such as `runs/a.1`.",
    )

    @model_validator(mode="after")
    def _check_existing(self) -> Self:
        if self.resume == "ledger" and self.existing == "set_aside":
            raise ConfigError(
                "resume='ledger' resumes what the folder holds, so existing='set_aside' would never happen: give "
                "one of the two"
            )
        return self

    @classmethod
    def of(cls, settings: Mapping[str, Any], *, taken_by: Callable[..., Any] | None = None) -> Self:
        """The settings in `settings`, checked; all others have their defaults. **Rank-local**.

        Args:
            settings: Values by name.
            taken_by: Class or function that takes them beside arguments of its own, which an error names too.

        Raises:
            ConfigError: If a name is unknown or a value is wrong. Names the setting, what was expected, and what was
                found, or the nearest known name.
        """
        try:
            return cls.model_validate(dict(settings))
        except ValidationError as error:
            known = [*(_own_arguments(taken_by) if taken_by is not None else ()), *cls.model_fields]
            raise ConfigError("\n".join(describe(error, lambda _: known))) from None


def _own_arguments(taken_by: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(taken_by).parameters.values()
    return [each.name for each in parameters if each.kind is not each.VAR_KEYWORD]


def timeouts_to_connect(settings: Mapping[str, Any]) -> dict[str, float]:
    """The timeouts in `settings`, or the defaults if one of them is wrong. **Rank-local**.

    Ranks that are not connected cannot report what is wrong. So this does not raise: `check_settings` does, which the
    ranks call when they are connected.
    """
    try:
        checked = KeeperSettings.model_validate({name: settings[name] for name in _TIMEOUTS if name in settings})
    except ValidationError:
        checked = KeeperSettings()
    return {name: getattr(checked, name) for name in _TIMEOUTS}


@dataclass(frozen=True, slots=True)
class CheckedSettings:
    """The settings of a keeper, and what follows from them for its model and metric.

    Attributes:
        given: Settings as they were given.
        directory: Directory of the run, which stays where it is when the process changes its working directory.
        name: Name of the keeper, which is that of its ref on the best.
        policy: Policy by which it decides.
        items: What is saved.
        hooks: Functions that are called on each new best.
    """

    given: KeeperSettings
    directory: Path
    name: str
    policy: Policy
    items: Items
    hooks: tuple[Hook, ...]

    def to_compare(self) -> bytes:
        """What must be equal on all ranks: every setting, and what follows from them."""
        found = f"is_higher_better={self.policy.higher_is_better} parts={self.items.parts}"
        states = list(self.items.training_state)
        return (
            f"keeper={self.name} {self.given} {found} training_state={states} {hooks_to_compare(self.hooks)}".encode()
        )


def check_settings(
    settings: Mapping[str, Any],
    model: nn.Module,
    *,
    directory: str | Path,
    metric_key: str,
    metric_property_provider: MetricPropertyProvider | None,
    training_state: object,
    on_new_best: object,
) -> CheckedSettings:
    """The arguments of `BestKeeper`, which describes them, checked. **Rank-local**.

    Raises:
        ConfigError: If one of them, or two together, cannot be right.
    """
    given = KeeperSettings.of(settings)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got {type(model).__name__}; its parts go by model_names")
    check_metric_key(metric_key)
    given = given.model_copy(update={"remote": check_remote(given.remote)})
    higher_is_better = given.higher_is_better
    if higher_is_better is None:
        _check_provider(metric_property_provider)
        higher_is_better = (metric_property_provider or MetricPropertyProvider()).higher_is_better(metric_key)
    parts = select_parts(model, given.model_names)
    states = check_states(training_state, [part.name for part in parts])
    check_format(given.format)
    return CheckedSettings(
        given=given,
        directory=local_path(directory, "directory"),
        name=best_ref(metric_key, given.id),
        policy=Policy(
            higher_is_better, given.min_delta, tuple(given.tolerances or ()), given.keep_top_k, given.baseline
        ),
        items=Items(model, parts, given.save_frozen_weights, states),
        hooks=check_hooks(on_new_best),
    )


def _check_provider(provider: object) -> None:
    if isinstance(provider, type) or not (provider is None or callable(getattr(provider, "higher_is_better", None))):
        raise ConfigError(f"metric_property_provider must be a MetricPropertyProvider(), got {provider!r}")


def check_flag(name: str, value: object) -> None:
    """Raise `ConfigError` unless `value` is a bool. Of the settings of an adapter, which pydantic does not check."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be a valid boolean, found {value!r}")


def check_metric_key(metric_key: object) -> None:
    """Raise `ConfigError` unless `metric_key` is the name of a metric."""
    if not isinstance(metric_key, str) or not metric_key.strip():
        raise ConfigError(f"metric_key must be the name of a metric, such as 'loss/val/total', got {metric_key!r}")

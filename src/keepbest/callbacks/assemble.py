"""The assembly of a run's callbacks from their configs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from keepbest.callbacks.base import CallbackBase
from keepbest.callbacks.config import CallBackBaseConfig, known_settings
from keepbest.errors import ConfigError
from keepbest.validation import describe


def assemble_callbacks(configs: Sequence[CallBackBaseConfig | Mapping[str, Any]], **context: Any) -> list[CallbackBase]:
    """Build the callbacks of a run, in the order in which they are called. As **collective** as their constructors are.

    This is the order of `configs`, except that callbacks that ask to run last come after all others.

    Args:
        configs: Configs, or mappings with a `kind` or `name` that describe one.
        **context: Arguments that each callback receives in addition to its config. They are those of `CallbackBase`.

    Raises:
        ConfigError: If a config is invalid (it names its place in the list), or if the state keys of two callbacks are
            equal, or differ in upper and lower case only.
    """
    callbacks = [_build(index, config, context) for index, config in enumerate(configs)]
    places: dict[str, int] = {}
    for index, callback in enumerate(callbacks):
        first = places.setdefault(callback.state_key.casefold(), index)
        if first != index:
            raise ConfigError(
                f"callbacks[{first}] and callbacks[{index}] cannot be distinguished: their state keys are "
                f"{callbacks[first].state_key!r} and {callback.state_key!r}; "
                "remove one of them, or give them different settings or ids"
            )
    return sorted(callbacks, key=lambda callback: callback.runs_last)


def _build(index: int, given: CallBackBaseConfig | Mapping[str, Any], context: dict[str, Any]) -> CallbackBase:
    try:
        config = _parse(given)
        return config.callback_class(config, **context)
    except (ConfigError, ValidationError) as error:
        raise ConfigError(f"callbacks[{index}]: {error}") from error


def _parse(given: CallBackBaseConfig | Mapping[str, Any]) -> CallBackBaseConfig:
    try:
        return CallBackBaseConfig.parse(given)
    except ValidationError as error:
        raise ConfigError("\n".join(describe(error, lambda place: known_settings(given, place)))) from None

"""What a config builds by calling something: models, datasets, optimizers, hooks."""

from __future__ import annotations

import reprlib
from typing import Any

from pydantic import BaseModel, ConfigDict

from keepbest.callbacks.config import import_path
from keepbest.errors import ConfigError


class Component(BaseModel):
    """Something that is built by a call of what `kind` names, with the other keys as keyword arguments.

    Mappings with a `kind` among the arguments are built first, at any depth.

    Attributes:
        kind: Dotted path of a class or function.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    kind: str

    def build(self, *arguments: Any) -> Any:
        """Call what `kind` names. **Rank-local**.

        Args:
            *arguments: Positional arguments, before the keys of this config.

        Raises:
            ConfigError: If there is nothing at `kind`, or it does not take these arguments.
        """
        factory = import_path(self.kind, known=[])
        named = {name: _built(value) for name, value in (self.model_extra or {}).items()}
        try:
            return factory(*arguments, **named)
        except ConfigError:
            raise
        except (TypeError, ValueError) as error:
            given = ", ".join(f"{name}={reprlib.repr(value)}" for name, value in named.items()) or "no settings"
            raise ConfigError(f"cannot build {self.kind} with {given}: {error}") from error


def _built(value: Any) -> Any:
    if isinstance(value, dict):
        if "kind" in value:
            return Component.model_validate(value).build()
        return {key: _built(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_built(part) for part in value]
    return value

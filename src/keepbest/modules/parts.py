"""Which parts of a model are saved, and under which names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from keepbest.errors import ConfigError
from keepbest.listing import listed
from keepbest.models import CompositeModel
from keepbest.modules.wrappers import modules_along, refuse_keys_that_fall_together, unwrap, walk

MOST_NAMES = 40
"""So many names an error lists where somebody has written one that does not exist."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the model that becomes one file.

    Attributes:
        name: Name of the file, without its ending: `encoder`, `autoencoder.encoder`, or `model` for the whole model.
        path: Plain dotted path of the module in the model; empty for the model itself.
        apart: Plain paths, relative to `path`, of parts of their own that are not in this file.
    """

    name: str
    path: str
    apart: tuple[str, ...] = ()

    def holds(self, key: str) -> bool:
        """Whether the plain `key`, relative to `path`, belongs to this part."""
        return not any(key.startswith(f"{path}.") for path in self.apart)


def select_parts(model: nn.Module, model_names: Sequence[str] | None = None) -> tuple[Part, ...]:
    """Return the parts of `model` that `model_names` names. **Rank-local**.

    Args:
        model: Model, plain or wrapped.
        model_names: Submodels of a `CompositeModel` (dotted for nested ones), or dotted module paths of any module.
            `None` selects everything: each submodel of a `CompositeModel`, or a plain module as one part.

    Raises:
        ConfigError: If a name does not exist (it lists those that do), names are empty, two are equal or differ in
            upper and lower case only, or two weights would have one plain name.
    """
    if model_names is not None and len(model_names) == 0:
        raise ConfigError("model_names is empty, so nothing would be saved; leave it out to save everything")
    refuse_keys_that_fall_together(model)
    parts: list[Part] = []
    for path in [""] if model_names is None else model_names:
        along = modules_along(model, path)
        if along is None or (model_names is not None and not path):
            raise ConfigError(f"model_names: there is no submodel {path!r}; there are: {_known_names(model)}")
        parts += _expand(along[-1][1], path)
    names = Counter(part.name.casefold() for part in parts)
    if twice := sorted(name for name, count in names.items() if count > 1):
        raise ConfigError(
            f"model_names: {', '.join(twice)} would be saved more than once under the same file name "
            "(upper and lower case are one name); name each submodel once"
        )
    return tuple(parts)


def _expand(module: nn.Module, path: str) -> list[Part]:
    plain = unwrap(module)
    if not isinstance(plain, CompositeModel):
        return [Part(path or "model", path)]
    parts: list[Part] = []
    for name, submodel in plain.submodels.items():
        parts += _expand(submodel, f"{path}.{name}" if path else name)
    rest = Part(path or "model", path, apart=tuple(plain.submodels))
    # Weights and extra state of the composite itself, outside of its submodels, must not be lost.
    own = [*plain.named_parameters(), *plain.named_buffers()]
    has_state = type(plain).get_extra_state is not nn.Module.get_extra_state
    return [*parts, rest] if has_state or any(rest.holds(key) for key, _ in own) else parts


def _known_names(model: nn.Module) -> str:
    plain = unwrap(model)
    if isinstance(plain, CompositeModel):
        names = list(plain.submodels)
    else:
        names = sorted({path for path, _ in walk(model) if path}, key=lambda path: (path.count("."), path))
    return listed(names, most=MOST_NAMES) or "none"

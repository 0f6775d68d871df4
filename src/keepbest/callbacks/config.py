"""Configs that are found by name: a registry that fills itself, and the base of all callback configs."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, core_schema
from typing_extensions import Self

from keepbest.errors import ConfigError
from keepbest.interval import Interval
from keepbest.validation import Place

if TYPE_CHECKING:
    from keepbest.callbacks.base import CallbackBase

PositiveInt = Annotated[int, Field(gt=0, strict=True)]


class RegisteredConfig(BaseModel):
    """A config whose class is chosen by the data: by `kind` or by the registered `name`.

    A direct subclass is the root of a registry of its own. Every class below a root that declares a default for `name`
    is registered under it as soon as it is defined.

    Attributes:
        kind: Dotted path of a config class, or of a class that has its config as class attribute `config_class`. It is
            imported on demand, so it may belong to any package.
        name: Registered name of the config class.

    Raises:
        ConfigError: If a class is defined with a `name` that another class of the registry has.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    registry: ClassVar[dict[str, type[RegisteredConfig]]]

    kind: str | None = None
    name: str | None = None

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if RegisteredConfig in cls.__bases__:
            cls.registry = {}
        name = cls.model_fields["name"].default
        inherited = {base.model_fields["name"].default for base in cls.__bases__ if issubclass(base, RegisteredConfig)}
        if name is None or name in inherited:
            return
        other = cls.registry.setdefault(name, cls)
        if _path(other) != _path(cls):
            raise ConfigError(
                f"the name {name!r} of {_path(cls)} is already taken by {_path(other)}; give it another one"
            )
        cls.registry[name] = cls

    @classmethod
    def find(cls, *, kind: str | None, name: str | None) -> type[Self]:
        """Find the config class below this root by `kind`, or else by `name`. **Rank-local**.

        Raises:
            ConfigError: If both are `None`, or nothing suitable is found. It lists what is known and what is nearest.
        """
        if kind is not None:
            found = import_path(kind, known=cls._known_paths())
            config = getattr(found, "config_class", found)
            if not (isinstance(config, type) and issubclass(config, cls)):
                raise ConfigError(
                    f"kind {kind!r} is neither a {cls.__name__} nor a class whose config_class is one: found {found!r}"
                )
            return config
        if name is None:
            raise ConfigError(f"expected a kind (a dotted path) or a name; known names: {_listed(cls.registry)}")
        if name not in cls.registry:
            raise ConfigError(f"unknown name {name!r}{_nearest(name, cls.registry)}; known: {_listed(cls.registry)}")
        return cast("type[Self]", cls.registry[name])

    @classmethod
    def parse(cls, value: Any) -> Self:
        """Return the config that `value` describes. **Rank-local**.

        Args:
            value: Mapping with `kind` or `name`, or a config already.

        Raises:
            ConfigError: If `value` is something else, or its class cannot be found.
            pydantic.ValidationError: If the other keys do not fit the class that was found.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f"expected a mapping with a kind or a name; found {value!r}")
        for key in ("kind", "name"):
            if not isinstance(value.get(key), str | None):
                raise ConfigError(f"{key} must be a string, found {value[key]!r}")
        return cls.find(kind=value.get("kind"), name=value.get("name")).model_validate(dict(value))

    @classmethod
    def _known_paths(cls) -> list[str]:
        return [_path(config) for config in cls.registry.values()]


ConfigT = TypeVar("ConfigT", bound=RegisteredConfig)


class Discriminated(Generic[ConfigT]):
    """Marks a field as holding any config below a root: `list[Annotated[Any, Discriminated(CallBackBaseConfig)]]`."""

    def __init__(self, root: type[ConfigT]) -> None:
        self.root = root

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        del source, handler
        return core_schema.no_info_before_validator_function(self.root.parse, core_schema.any_schema())


class CallBackBaseConfig(RegisteredConfig):
    """Base of every callback's config. A subclass declares `name: Literal["MyCallback"] = "MyCallback"`.

    Attributes:
        kind: Dotted path of the callback or config class.
        name: Registered name of the config class.
        every_n_epochs: Number of epochs after which the callback runs, > 0. Exactly one of `every_n_epochs`,
            `every_n_updates` and `every_n_samples` is set.
        every_n_updates: Number of optimizer updates after which the callback runs, > 0.
        every_n_samples: Number of samples after which the callback runs, > 0.
        batch_size: Number of samples of one evaluation batch on one rank; `None` takes as many as in training. Required
            with `every_n_samples`.
    """

    callback_type: ClassVar[type[CallbackBase]]

    every_n_epochs: PositiveInt | None = None
    every_n_updates: PositiveInt | None = None
    every_n_samples: PositiveInt | None = None
    batch_size: PositiveInt | None = None

    @model_validator(mode="after")
    def _check_interval(self) -> Self:
        if self.interval.kind == "sample" and self.batch_size is None:
            raise ConfigError("every_n_samples needs a batch_size")
        return self

    @property
    def interval(self) -> Interval:
        """When the callback runs."""
        return Interval(self.every_n_epochs, self.every_n_updates, self.every_n_samples)

    @property
    def callback_class(self) -> type[CallbackBase]:
        """The callback class of this config: the one that `kind` names, or else the one that names this config.

        Raises:
            ConfigError: If no callback names this config.
        """
        if self.kind is not None:
            found = import_path(self.kind, known=self._known_paths())
            if hasattr(found, "config_class"):
                return cast("type[CallbackBase]", found)
        # A derived config does not inherit the callback of its base, which knows nothing of its fields.
        if "callback_type" not in vars(type(self)):
            raise ConfigError(
                f"no callback has config_class = {type(self).__name__}; "
                "import the module that defines it, or give its dotted path as kind"
            )
        return self.callback_type


def known_settings(content: Any, place: Place) -> Iterable[str]:
    """Names of the settings of the callback at `place` in `content`; none if there is no callback. **Rank-local**."""
    for part in place:
        is_index = isinstance(content, list | tuple) and isinstance(part, int)
        if not is_index and not (isinstance(content, Mapping) and part in content):
            return ()  # where a value may be of several types, pydantic adds the type to the place
        content = content[part]
    choice = {key: content.get(key) for key in ("kind", "name")} if isinstance(content, Mapping) else {}
    return CallBackBaseConfig.find(**choice).model_fields if any(choice.values()) else ()


def import_path(path: str, *, known: list[str]) -> Any:
    """Import the object at a dotted path. **Rank-local**.

    Args:
        path: Path of the form `package.module.Name`.
        known: Paths to suggest when there is nothing at `path`.

    Raises:
        ConfigError: If there is no such module, or no such name in it. Errors of the module itself are raised as they
            are.
    """
    module_name, _, name = path.rpartition(".")
    hint = f"{_nearest(path, known)}; known: {_listed(known)}" if known else ""
    if not all(path.split(".")) or not module_name:
        raise ConfigError(f"kind {path!r} is not a dotted path like package.module.Name{hint}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(f"unknown kind {path!r}: there is no module {error.name!r}{hint}") from None
    if not hasattr(module, name):
        raise ConfigError(f"unknown kind {path!r}: module {module_name!r} has no {name!r}{hint}")
    return getattr(module, name)


def _path(config: type) -> str:
    return f"{config.__module__}.{config.__qualname__}"


def _nearest(word: str, known: Mapping[str, Any] | list[str]) -> str:
    # The last part of a path is what the user meant. Its modules would only hide the difference.
    by_last_part = {path.rpartition(".")[2]: path for path in known}
    near = difflib.get_close_matches(word.rpartition(".")[2], by_last_part, n=1, cutoff=0.4)
    return f" (did you mean {by_last_part[near[0]]!r}?)" if near else ""


def _listed(known: Mapping[str, Any] | list[str]) -> str:
    return ", ".join(sorted(known)) or "none"

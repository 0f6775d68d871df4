"""The YAML file of a run, with settings of the command line. **Rank-local**."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from typing_extensions import Self

from keepbest.callbacks.config import known_settings
from keepbest.errors import ConfigError
from keepbest.run.no_links import check_own
from keepbest.training.config import CONFIG_FILE, RunConfig, TrainerConfig
from keepbest.validation import Place, describe

_MERGE = "tag:yaml.org,2002:merge"


@dataclass(frozen=True, slots=True)
class RunFile:
    """A run as it was written, and its config.

    Attributes:
        content: Content of the file in plain YAML values, with the settings that were changed.
        config: Validated config.
    """

    content: dict[str, Any]
    config: RunConfig

    @classmethod
    def read(cls, path: Path, settings: Mapping[str, Any]) -> Self:
        """Read the file at `path`.

        Args:
            path: Path of a YAML file.
            settings: Values by dotted key, which replace those in the file. Items of lists have numbers as keys.

        Raises:
            ConfigError: If the file cannot be read, or does not describe a run. It names the place, and what is known
                there.
        """
        try:
            # YAML says of itself how it is encoded; the locale of this process does not.
            with path.open("rb") as file:
                content = yaml.load(file, _Loader)  # noqa: S506  # a SafeLoader
        except OSError as error:
            raise ConfigError(f"cannot read the config {path}: {error.strerror or error}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"cannot read the config {path}: {error}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{path} must hold a mapping of settings, found {content!r}")
        for key, value in settings.items():
            _set(content, key, value)
        known = partial(_known_settings, content)
        try:
            return cls(content, RunConfig.model_validate(content))
        except ValidationError as error:
            raise ConfigError("\n".join([f"{path} does not describe a run:", *describe(error, known)])) from None

    def save(self) -> None:
        """Write the content to `config.yaml` in the directory of the run. A crash leaves the old file or the new one.

        Raises:
            SnapshotError: If one of the two is a link.
            OSError: If the file system refuses.
        """
        path = self.config.directory / CONFIG_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        check_own(path)
        check_own(temporary)
        temporary.write_text(yaml.safe_dump(self.content, sort_keys=False), encoding="utf-8")
        temporary.replace(path)


def parse_settings(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the values by dotted key of arguments like `trainer.epochs=3`. Values are YAML.

    Raises:
        ConfigError: If an argument has another form, or a key is there twice.
    """
    settings: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"expected a setting like trainer.epochs=3, found {argument!r}")
        if key in settings:
            first = next(each for each in arguments if each.partition("=")[0] == key)
            raise ConfigError(f"{key} is given twice, as {first!r} and as {argument!r}: remove one of them")
        try:
            settings[key] = yaml.load(text, _Loader)  # noqa: S506  # a SafeLoader
        except yaml.YAMLError as error:
            raise ConfigError(f"the value of {key} is not YAML: {text!r}: {error}") from error
    return settings


class _Loader(yaml.SafeLoader):
    """Reads `1e-3` as a number, as YAML 1.2 does and as users expect of a learning rate, and each key only once."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:  # as yaml has it
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError) as error:  # of 2026-02-30, for example
            kind = node.tag.rpartition(":")[2]
            raise yaml.MarkedYAMLError(problem=f"this is no {kind}: {error}", problem_mark=node.start_mark) from error

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here, since merges (`<<`) are not resolved yet: a key may replace one that was merged.
        mapping = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], yaml.Mark] = {}
        for key, _ in mapping.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            mark = first.setdefault((key.tag, key.value), key.start_mark)
            if mark is not key.start_mark:
                raise yaml.MarkedYAMLError("the key stands here", mark, f"{key.value!r} is there twice", key.start_mark)
        return mapping


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)


def _set(content: Any, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    place = content
    for depth, name in enumerate(parents):
        at = name if isinstance(place, dict) else _index(place, key, name)
        inner = place.get(at, {}) if isinstance(place, dict) else place[at]
        if not isinstance(inner, dict | list):
            raise ConfigError(f"{key}: {'.'.join(parents[: depth + 1])} is {inner!r} and has no keys")
        place[at] = copy(inner)  # aliases in the file are one object, and this one alone is meant
        place = place[at]
    place[last if isinstance(place, dict) else _index(place, key, last)] = value


def _index(items: list[Any], key: str, name: str) -> int:
    if not name.isdecimal() or int(name) >= len(items):
        raise ConfigError(f"{key}: {name!r} must be the number of one of {len(items)} items, from 0")
    return int(name)


def _known_settings(content: Any, place: Place) -> Iterable[str]:
    if not place:
        return RunConfig.model_fields
    if place == ("trainer",):
        return TrainerConfig.model_fields
    return known_settings(content, place)

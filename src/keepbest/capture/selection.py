"""Which of the names of a model are wanted. **Rank-local**."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from keepbest.errors import ConfigError
from keepbest.listing import listed
from keepbest.modules.parts import MOST_NAMES, Part
from keepbest.run.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Selection:
    """A choice of names of a model.

    Attributes:
        paths: Dotted paths that are wanted, with all that is below them; `None` is everything.
    """

    paths: tuple[str, ...] | None

    @classmethod
    def of(cls, only: str | Sequence[str] | None) -> Selection:
        """The selection that a user wrote. Raises `ConfigError` if it is none."""
        if only is None:
            return cls(None)
        given: tuple[object, ...] = (only,) if isinstance(only, str) else tuple(only)
        paths = tuple(path for path in given if isinstance(path, str) and path)
        if not paths or paths != given:
            raise ConfigError(f"only must be a dotted path or a sequence of them, got {only!r}")
        return cls(paths)

    def holds(self, key: str) -> bool:
        """Whether the name `key` in the whole model is wanted."""
        return self.paths is None or any(key == path or key.startswith(f"{path}.") for path in self.paths)

    def may_hold(self, part: Part) -> bool:
        """Whether anything of `part` can be wanted. All else of a snapshot need not be read."""
        return self.paths is None or any(_meet(path, part) for path in self.paths)

    def check(self, keys: Iterable[str]) -> None:
        """Check that each path is one of those in the snapshot, whose names are `keys`. Raises `ConfigError`."""
        there = {".".join(words[: end + 1]) for words in (key.split(".") for key in keys) for end in range(len(words))}
        if strange := [path for path in self.paths or () if path not in there]:
            known = sorted(there, key=lambda path: (path.count("."), path))
            raise ConfigError(
                f"only: the snapshot has nothing at {strange[0]!r}; there are: {listed(known, most=MOST_NAMES)}"
            )


def chosen_parts(manifest: Manifest, selection: Selection) -> tuple[Part, ...]:
    """The parts of a snapshot that are read: those that have files, and in which anything may be wanted."""
    return tuple(part for each in manifest.saved_parts if selection.may_hold(part := Part(*each)))


def unread_parts(manifest: Manifest, selection: Selection) -> tuple[Part, ...]:
    """The other parts that have files."""
    return tuple(part for each in manifest.saved_parts if not selection.may_hold(part := Part(*each)))


def _meet(path: str, part: Part) -> bool:
    """Whether `path` leads into `part`, or `part` is below it."""
    if not part.path:
        return part.holds(f"{path}.")
    if path.startswith(f"{part.path}."):
        return part.holds(f"{path.removeprefix(f'{part.path}.')}.")
    return path == part.path or part.path.startswith(f"{path}.")

"""Which of the names of a model are wanted. **Rank-local**."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from keepbest.errors import ConfigError

_LISTED_NAMES = 40


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

    def check(self, keys: Iterable[str]) -> None:
        """Check that each path is one of those in the snapshot, whose names are `keys`. Raises `ConfigError`."""
        there = {".".join(words[: end + 1]) for words in (key.split(".") for key in keys) for end in range(len(words))}
        if strange := [path for path in self.paths or () if path not in there]:
            known = sorted(there, key=lambda path: (path.count("."), path))
            shown = ", ".join(known[:_LISTED_NAMES]) + (", ..." if len(known) > _LISTED_NAMES else "")
            raise ConfigError(f"only: the snapshot has nothing at {strange[0]!r}; there are: {shown}")

"""Plain data: containers in containers, and what they hold. **Rank-local**."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import cast

_MAPPINGS = (dict, OrderedDict, Counter)
_ROWS = (list, tuple, set)


def leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """What `value` holds that is no container, also the keys of its mappings, each with the way to it.

    Containers are known by their exact class. Each is visited once, so one that holds itself has an end.
    """
    stack, seen = [(path, value)], set[int]()
    while stack:
        path, value = stack.pop()
        if type(value) not in (*_MAPPINGS, *_ROWS):
            yield path, value
            continue
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, _MAPPINGS):
            entries = list(cast("Mapping[object, object]", value).items())
            inside = [(f"{path}[{key!r}]", each) for key, each in entries]
            inside += [(f"{path}, the key {key!r}", key) for key, _ in entries]
        else:
            inside = [(f"{path}[{place}]", each) for place, each in enumerate(cast("Iterable[object]", value))]
        stack += reversed(inside)

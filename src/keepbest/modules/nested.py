"""Plain data: containers in containers, and what they hold. **Rank-local**."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import cast

_MAPPINGS = (dict, OrderedDict, Counter)
_ROWS = (list, tuple, set)

Path = tuple[object, ...]
"""The way to something in nested data: a key or a place for each container."""


def leaves(value: object) -> Iterator[tuple[Path, object]]:
    """What `value` holds that is no container, also the keys of its mappings, each with the way to it.

    Containers are known by their exact class. Each is visited once, so one that holds itself has an end.
    """
    if not _is_container(value):
        yield (), value
        return
    seen, path, open_ones = {id(value)}, list[object](), [_inside(value)]
    while open_ones:
        for step, each in open_ones[-1]:
            if not _is_container(each):
                yield (*path, step), each
            elif id(each) not in seen:
                seen.add(id(each))
                path.append(step)
                open_ones.append(_inside(each))
                break
        else:
            open_ones.pop()
            del path[-1:]


def spelled(path: Path) -> str:
    """A way to something, as Python would write it."""
    return "".join(f"[{step!r}]" for step in path)


def _is_container(value: object) -> bool:
    return type(value) in _MAPPINGS or type(value) in _ROWS


def _inside(value: object) -> Iterator[tuple[object, object]]:
    if isinstance(value, _MAPPINGS):
        entries = cast("Mapping[object, object]", value)
        return chain(entries.items(), ((key, key) for key in entries))
    return iter(enumerate(cast("Iterable[object]", value)))

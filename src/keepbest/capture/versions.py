"""The versions of modules, by which a class migrates the weights that an older one of its kind saved. **Rank-local**.

torch's `state_dict()` carries the version of each module, and `load_state_dict` hands it to the module again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from keepbest.modules.parts import Part
from keepbest.modules.sources import Source
from keepbest.modules.state_dicts import UNRECORDED, Version, paths_above
from keepbest.modules.wrappers import walk, wrapper_of

RecordedVersions = Mapping[str, Mapping[str, Version]] | None
"""For each part the recorded versions, by the path of the module in it; `None` if none were recorded."""


def versions_of(source: Source) -> dict[tuple[Part, str], Version]:
    """The versions in a source that are not `UNRECORDED`, by the part and the path of the module in it."""
    found: dict[tuple[Part, str], Version] = {}
    for path, module in walk(source.module):
        version: object = module._version  # noqa: SLF001  # torch's own protocol
        if wrapper_of(module) is None and version != UNRECORDED and isinstance(version, Version):
            found |= dict.fromkeys(_places(source, path), version)
    return found


def saved_versions(source: Source, versions: RecordedVersions, keys: Iterable[str]) -> dict[str, object]:
    """The versions that the modules of a source had when they were saved, by their plain paths in it.

    Args:
        source: Source that is loaded.
        versions: Recorded versions of the modules.
        keys: Plain keys of what is loaded. A module that gets nothing has nothing to migrate.
    """
    if versions is None:
        return {}
    loaded, found = paths_above(keys), dict[str, object]()
    for path, module in walk(source.module):
        if path in loaded:  # of a wrapper and what it wraps, which have one path, the latter comes last
            present: object = module._version  # noqa: SLF001  # torch's own protocol
            # Versions of other types than those that are recorded are taken to be those of now.
            otherwise = UNRECORDED if isinstance(present, Version) else present
            for part, key in _places(source, path):
                found[path] = versions.get(part.name, {}).get(key, otherwise)
    return found


def _places(source: Source, path: str) -> list[tuple[Part, str]]:
    """The parts that a module of a source is in, and its path there."""
    inside = ((part, source.key_in(part, f"{path}." if path else "")) for part in source.parts)
    return [(part, key.removesuffix(".")) for part, key in inside if key is not None]

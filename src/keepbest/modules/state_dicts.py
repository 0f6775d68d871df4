"""The model's own `state_dict` and `load_state_dict`, also overrides with older signatures. **Rank-local**.

torch passes `destination`, `prefix` and `keep_vars` down to each child, and users pass `strict`. Overrides that were
written before there were these arguments know nothing of them.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from keepbest.modules.kinds import is_fsdp1
from keepbest.modules.wrappers import PlainNames, own_weights, wrapper_of

Version = int | float | str
"""Of the class of a module. A newer one migrates what an older one saved: torch hands it the version then."""
UNRECORDED = 1  # the version that torch gives to each module without one of its own

_METADATA = "_metadata"  # where torch has the versions of a state dict
_STATE_DICT_ARGUMENTS = ("destination", "prefix", "keep_vars")


def state_dict_of(module: nn.Module, *, keep_vars: bool = False) -> Mapping[str, Any]:
    """Return `module.state_dict()`, also where an override takes fewer arguments.

    Args:
        module: Module, plain or wrapped.
        keep_vars: Whether the parameters themselves are wanted. An override that cannot be asked for them gives what it
            gives.
    """
    with _modern_signatures(module):
        state: Mapping[str, Any] = module.state_dict(keep_vars=keep_vars)
    return state


def loading_module(module: nn.Module) -> nn.Module:
    """Return the module whose `load_state_dict` is called for `module`: the user's own, or a unit of FSDP1.

    Other wrappers do not call the method of what they wrap, so an override in it would not run. A wrapper with weights
    of its own is loaded as a whole.
    """
    while not is_fsdp1(module) and (wrapper := wrapper_of(module)) is not None and not own_weights(module):
        module = wrapper.inner
    return module


class NotLoaded(NamedTuple):
    """Keys of a state dict that `load_state_dict` said not to have loaded.

    Attributes:
        unused: Keys that the module had no use for.
        missing: Keys that it had use for and did not find, since an override left them out, or loaded them itself.
    """

    unused: list[str]
    missing: list[str]


def load_state(
    module: nn.Module, state: Mapping[str, Any], others: Mapping[str, Any], versions: Mapping[str, object]
) -> NotLoaded:
    """Load `state` by the `load_state_dict` of `module`. **Collective** where it holds FSDP1 units.

    Args:
        module: What `loading_module` returned.
        state: Entries that are loaded, by the keys of its state dict.
        others: The other entries of its state dict, for a `load_state_dict` that wants all of them.
        versions: Versions of the modules in it when they were saved, by their plain paths. The others get their own.

    Returns:
        Keys of `state` that were not loaded, or may not have been.
    """
    versioned = versioned_for(module, state, versions)
    if _takes(module.load_state_dict, "strict"):
        result: object = module.load_state_dict(versioned, strict=False)
    else:
        versioned.update((key, value) for key, value in others.items() if key not in state)
        result = module.load_state_dict(versioned)
    unused, missing = (getattr(result, name, ()) for name in ("unexpected_keys", "missing_keys"))
    return NotLoaded(*([key for key in keys if key in state] for keys in (unused, missing)))


def with_versions(state: Mapping[str, Any], versions: Mapping[str, Version]) -> OrderedDict[str, Any]:
    """`state` as torch gives it: with the version of each module, which torch saves with it.

    Args:
        state: State dict.
        versions: Versions of the modules in it that are not `UNRECORDED`, by their paths.
    """
    versioned = OrderedDict(state)
    paths = sorted(paths_above(state))
    vars(versioned)[_METADATA] = {path: {"version": versions.get(path, UNRECORDED)} for path in paths}
    return versioned


def paths_above(keys: Iterable[str]) -> set[str]:
    """The paths of all modules that have one of these keys, or are above one."""
    found: set[str] = set()
    for path in keys:
        while path and (path := path.rpartition(".")[0]) not in found:
            found.add(path)
    return found


def versioned_for(module: nn.Module, state: Mapping[str, Any], versions: Mapping[str, object]) -> OrderedDict[str, Any]:
    """`state`, of `module`, as torch gives it: modules read from it whether it is of an older version.

    Args:
        module: Module, plain or wrapped.
        state: State dict with the keys of the module.
        versions: Versions of the modules in it, by their plain paths. The others get their own.
    """
    names, metadata = PlainNames(module), dict[str, dict[str, object]]()
    for name, inner in module.named_modules(remove_duplicate=False):
        present: object = inner._version  # noqa: SLF001  # torch's own protocol
        is_own = wrapper_of(inner) is None
        metadata[name] = {"version": versions.get(names.plain(name), present) if is_own else present}
    vars(versioned := OrderedDict(state))[_METADATA] = metadata
    return versioned


@contextmanager
def _modern_signatures(module: nn.Module) -> Iterator[None]:
    """In this block each `state_dict` in `module` takes what torch passes to it."""
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for inner in module.modules():
        own = vars(inner)
        is_overridden = "state_dict" in own or type(inner).state_dict is not nn.Module.state_dict
        if is_overridden and not all(_takes(inner.state_dict, name) for name in _STATE_DICT_ARGUMENTS):
            before.append((own, {"state_dict": own["state_dict"]} if "state_dict" in own else {}))
            own["state_dict"] = partial(_adapted, inner.state_dict)
    try:
        yield
    finally:
        for own, given in before:
            del own["state_dict"]
            own.update(given)


def _adapted(
    original: Callable[..., Mapping[str, Any]],
    *,
    destination: dict[str, Any] | None = None,
    prefix: str = "",
    keep_vars: bool = False,
) -> Mapping[str, Any]:
    """What `original` gives, under the prefix, and in the destination."""
    offered: dict[str, Any] = {"prefix": prefix, "keep_vars": keep_vars}
    if _takes(original, "prefix"):
        offered["destination"] = OrderedDict() if destination is None else destination
    taken = {name: value for name, value in offered.items() if _takes(original, name)}
    given = original(**taken)
    if "prefix" not in taken:
        given = {prefix + key: value for key, value in given.items()}
    if destination is None:
        return given
    if "destination" not in taken:
        destination.update(given)
    return destination


def _takes(method: Callable[..., Any], name: str) -> bool:
    """Whether `method` has an argument of this name."""
    parameters = inspect.signature(method).parameters
    return name in parameters or any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())

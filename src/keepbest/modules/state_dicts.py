"""The model's own `state_dict` and `load_state_dict`, also those with the signatures of old. **Rank-local**.

torch passes `destination`, `prefix` and `keep_vars` down to each child, and users pass `strict`. Overrides that were
written before there were these arguments know nothing of them.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from keepbest.modules.kinds import is_fsdp1
from keepbest.modules.wrappers import own_weights, wrapper_of

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


def load_state(module: nn.Module, state: Mapping[str, Any], others: Mapping[str, Any]) -> NotLoaded:
    """Load `state` by the `load_state_dict` of `module`. **Collective** where it holds FSDP1 units.

    Args:
        module: What `loading_module` returned.
        state: Entries that are loaded, by the keys of its state dict.
        others: The other entries of its state dict, for a `load_state_dict` that wants all of them.

    Returns:
        Keys of `state` that were not loaded, or may not have been.
    """
    with_versions = OrderedDict(state)
    # As torch does: modules read from it whether the state dict is of an older version, and is to be converted.
    modules = module.named_modules(remove_duplicate=False)
    versions = {name: {"version": inner._version} for name, inner in modules}  # noqa: SLF001  # torch's own protocol
    vars(with_versions)["_metadata"] = versions
    if _takes(module.load_state_dict, "strict"):
        result: object = module.load_state_dict(with_versions, strict=False)
    else:
        with_versions.update((key, value) for key, value in others.items() if key not in state)
        result = module.load_state_dict(with_versions)
    unused, missing = (getattr(result, name, ()) for name in ("unexpected_keys", "missing_keys"))
    return NotLoaded(*([key for key in keys if key in state] for keys in (unused, missing)))


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

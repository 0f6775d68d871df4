"""The plain names of a model's weights, independent of its wrappers.

Wrappers add their names to state-dict keys (`module.`, `_orig_mod.`, ...). These functions remove them by a walk over
the modules, never by replacing text: a submodule that a user called `module` keeps its name.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

# torch.compile, FSDP1 and activation checkpointing keep the module that they wrap under these names.
_NAMES_LEFT_OUT_OF_STATE_DICTS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPED_CHILD_NAMES = ("_orig_mod", *_NAMES_LEFT_OUT_OF_STATE_DICTS)


def wrapped_child(module: nn.Module) -> tuple[str, nn.Module] | None:
    """Return name and module of what `module` wraps; `None` if it is not a wrapper."""
    if isinstance(module, DistributedDataParallel | DataParallel | AveragedModel):
        return "module", module.module
    children = dict(module.named_children())
    return next(((name, children[name]) for name in _WRAPPED_CHILD_NAMES if name in children), None)


def keys_of_wrappers(module: nn.Module) -> set[str]:
    """Return the keys of `module.state_dict()` that belong to a wrapper, such as its count of averaged models."""
    averaged = (name for name, inner in module.named_modules() if isinstance(inner, AveragedModel))
    return {f"{name}.n_averaged" if name else "n_averaged" for name in averaged}


def unwrap(module: nn.Module) -> nn.Module:
    """Return the user's own module inside all wrappers around it."""
    while (wrapped := wrapped_child(module)) is not None:
        module = wrapped[1]
    return module


def plain_key(module: nn.Module, key: str) -> str:
    """Return `key`, a name of `module`'s state dict or parameters, without the names of wrappers."""
    parts, plain = key.split("."), list[str]()
    while parts:
        if (wrapped := wrapped_child(module)) is not None:
            name, module = wrapped
            # Some wrappers leave their name out of state dicts, but none out of the names of parameters.
            parts = parts[1:] if parts[0] == name else parts
            continue
        child = dict(module.named_children()).get(parts[0])
        plain.append(parts.pop(0))
        if child is None:
            return ".".join([*plain, *parts])
        module = child
    return ".".join(plain)


def state_dict_key(module: nn.Module, plain: str) -> str:
    """Return the key of `module.state_dict()` for a `plain` key, the inverse of `plain_key`."""
    parts, key = plain.split("."), list[str]()
    while True:
        if (wrapped := wrapped_child(module)) is not None:
            name, module = wrapped
            if name not in _NAMES_LEFT_OUT_OF_STATE_DICTS:
                key.append(name)
            continue
        child = dict(module.named_children()).get(parts[0]) if parts else None
        if child is None:
            return ".".join([*key, *parts])
        key.append(parts.pop(0))
        module = child


def walk(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield every module with its plain dotted path: parents first, wrappers before what they wrap (with one path)."""
    yield path, module
    if (wrapped := wrapped_child(module)) is not None:
        yield from walk(wrapped[1], path)
        return
    for name, child in module.named_children():
        yield from walk(child, f"{path}.{name}" if path else name)


def modules_along(module: nn.Module, path: str) -> list[tuple[str, nn.Module]] | None:
    """Return the modules from `module` down to the plain dotted `path`, with wrappers; `None` if there is no such path.

    The first module with this path ends the list, so a wrapper stands for the module that it wraps.
    """
    here, found = "", [("", module)]
    for name in path.split(".") if path else []:
        while (wrapped := wrapped_child(module)) is not None:
            module = wrapped[1]
            found.append((here, module))
        child = dict(module.named_children()).get(name)
        if child is None:
            return None
        here = f"{here}.{name}" if here else name
        module = child
        found.append((here, module))
    return found

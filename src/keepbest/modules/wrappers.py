"""The plain names of a model's weights, independent of its wrappers.

Wrappers add their names to state-dict keys (`module.`, `_orig_mod.`, ...). What is a wrapper is known by its class,
never by the name of a child: a submodule that a user called `module` or `_orig_mod` keeps its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeVar

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from keepbest.errors import ConfigError, SnapshotError
from keepbest.modules.kinds import is_activation_wrapper, is_compiled, is_fsdp1
from keepbest.modules.zero import is_deepspeed_engine

_T = TypeVar("_T")
_COUNT = "n_averaged"  # of averaged models: a buffer of `AveragedModel` that is no weight of the model


class _WrapperKind(NamedTuple):
    """A kind of wrapper.

    Attributes:
        matches: Function that tests whether a module is one.
        child: Name of the child that it wraps.
        shows: Whether this name is in the keys of state dicts. It always is in the names of parameters.
    """

    matches: Callable[[nn.Module], bool]
    child: str
    shows: bool


def _holds_module(module: nn.Module) -> bool:
    return isinstance(module, DistributedDataParallel | DataParallel | AveragedModel)


_KINDS = (
    _WrapperKind(_holds_module, "module", shows=True),
    _WrapperKind(is_deepspeed_engine, "module", shows=True),
    _WrapperKind(is_compiled, "_orig_mod", shows=True),
    _WrapperKind(is_fsdp1, "_fsdp_wrapped_module", shows=False),
    _WrapperKind(is_activation_wrapper, "_checkpoint_wrapped_module", shows=False),
)


class Wrapper(NamedTuple):
    """What a wrapper wraps.

    Attributes:
        name: Name of the child.
        inner: The child itself.
        shows: Whether the name is in the keys of state dicts.
    """

    name: str
    inner: nn.Module
    shows: bool


def wrapper_of(module: nn.Module) -> Wrapper | None:
    """Return what `module` wraps; `None` if it is not a wrapper. **Rank-local**."""
    for kind in _KINDS:
        if kind.matches(module) and (inner := _children(module).get(kind.child)) is not None:
            return Wrapper(kind.child, inner, kind.shows)
    return None


def unwrap(module: nn.Module) -> nn.Module:
    """Return the user's own module inside all wrappers around it."""
    while (wrapper := wrapper_of(module)) is not None:
        module = wrapper.inner
    return module


class PlainNames:
    """The plain names of the weights of a module, as it is wrapped now. **Rank-local**.

    Each module in it is looked at once, and each name, which costs no more than its depth.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._is_wrapped = any(wrapper_of(inner) is not None for inner in module.modules())
        self._seen: dict[int, tuple[Wrapper | None, frozenset[str]]] = {}
        self._parsed: dict[str, tuple[str, bool]] = {}

    def plain(self, key: str) -> str:
        """Return `key`, a name of the module's state dict or parameters, without the names of wrappers."""
        return self._parse(key)[0]

    def key(self, plain: str) -> str:
        """Return the key of the module's state dict for a `plain` key, the inverse of `plain`."""
        module, rest, key = self._module, plain.split("."), list[str]()
        while rest:
            wrapper, own = self._look_at(module)
            if wrapper is not None:
                if len(rest) == 1 and rest[0] in own:
                    break
                if wrapper.shows:
                    key.append(wrapper.name)
                module = wrapper.inner
                continue
            child = _children(module).get(rest[0])
            if child is None:
                break
            key.append(rest.pop(0))
            module = child
        return ".".join([*key, *rest])

    def plain_state(self, state: Mapping[str, _T]) -> dict[str, _T]:
        """Return `state`, a state dict of the module, with plain keys and without what belongs to a wrapper.

        Raises:
            SnapshotError: If two keys have the same plain key.
        """
        if not self._is_wrapped:
            return dict(state)
        keys: dict[str, str] = {}
        for key in state:
            plain, is_kept = self._parse(key)
            if is_kept and keys.setdefault(plain, key) != key:
                raise SnapshotError(_falls_together(keys[plain], key, plain))
        return {plain: state[key] for plain, key in keys.items()}

    def _parse(self, key: str) -> tuple[str, bool]:
        """Return the plain key, and whether what it names is no mere bookkeeping of a wrapper."""
        if not self._is_wrapped:
            return key, True
        if (parsed := self._parsed.get(key)) is None:
            parsed = self._parsed[key] = self._walk_along(key)
        return parsed

    def _walk_along(self, key: str) -> tuple[str, bool]:
        module, rest, plain = self._module, key.split("."), list[str]()
        while rest:
            wrapper, own = self._look_at(module)
            if wrapper is not None:
                # Some wrappers leave their name out of state dicts, but none out of the names of parameters.
                if rest[0] == wrapper.name:
                    rest.pop(0)
                elif len(rest) == 1 and isinstance(module, AveragedModel) and rest[0] == _COUNT:
                    return ".".join([*plain, *rest]), False
                elif len(rest) == 1 and rest[0] in own:
                    break
                module = wrapper.inner
                continue
            child = _children(module).get(rest[0])
            plain.append(rest.pop(0))
            if child is None:
                break
            module = child
        return ".".join([*plain, *rest]), True

    def _look_at(self, module: nn.Module) -> tuple[Wrapper | None, frozenset[str]]:
        """Return what `module` wraps, and its own weights if it wraps something."""
        if (found := self._seen.get(id(module))) is None:
            wrapper = wrapper_of(module)
            found = self._seen[id(module)] = wrapper, frozenset() if wrapper is None else own_weights(module)
        return found


def refuse_keys_that_fall_together(model: nn.Module) -> None:
    """Check that no weight of a wrapper has the plain name of something in what it wraps. **Rank-local**.

    Raises:
        ConfigError: If one has; it names both.
    """
    for path, module in walk(model):
        if (wrapper := wrapper_of(module)) is None:
            continue
        inner = unwrap(module)
        for name in sorted(own_weights(module) & (own_weights(inner) | _children(inner).keys())):
            plain, wrapped = (".".join(filter(None, [path, *names])) for names in ([name], [wrapper.name, name]))
            raise ConfigError(_falls_together(plain, wrapped, plain))


def walk(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield every module with its plain dotted path: parents first, wrappers before what they wrap (with one path).

    A module with several names is yielded under each of them.
    """
    yield path, module
    if (wrapper := wrapper_of(module)) is not None:
        yield from walk(wrapper.inner, path)
        return
    for name, child in _children(module).items():
        if child is not None:
            yield from walk(child, f"{path}.{name}" if path else name)


def modules_along(module: nn.Module, path: str) -> list[tuple[str, nn.Module]] | None:
    """Return the modules from `module` down to the plain dotted `path`, with wrappers; `None` if there is no such path.

    The first module with this path ends the list, so a wrapper stands for the module that it wraps.
    """
    here, found = "", [("", module)]
    for name in path.split(".") if path else []:
        while (wrapper := wrapper_of(module)) is not None:
            module = wrapper.inner
            found.append((here, module))
        child = _children(module).get(name)
        if child is None:
            return None
        here = f"{here}.{name}" if here else name
        module = child
        found.append((here, module))
    return found


def _children(module: nn.Module) -> dict[str, nn.Module | None]:
    children: Mapping[str, nn.Module | None] = module._modules  # noqa: SLF001  # named_children() leaves out names
    return children if isinstance(children, dict) else dict(children.items())  # TorchScript has a class of its own


def own_weights(module: nn.Module) -> frozenset[str]:
    """Return the names of the weights that are `module`'s own, not those of a module in it."""
    named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return frozenset(name for name, _ in named) - ({_COUNT} if isinstance(module, AveragedModel) else set())


def _falls_together(one: str, other: str, plain: str) -> str:
    return (
        f"{one!r} and {other!r} of the model would both be saved as {plain!r}, since names of wrappers are left out; "
        "rename one of them"
    )

"""The modules whose state dicts contain the parts of a snapshot. **Rank-local**."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from keepbest.errors import ConfigError
from keepbest.modules.kinds import is_fsdp1, is_fsdp2
from keepbest.modules.parts import Part
from keepbest.modules.state_dicts import state_dict_of
from keepbest.modules.wrappers import PlainNames, modules_along

StateDict = dict[str, Any]

_FLAT = "_flat_param"  # how FSDP1 names the one parameter of a unit without original parameters


@dataclass(frozen=True)
class Source:
    """A module whose state dict is read in one piece, and the parts that are in it.

    Attributes:
        path: Plain dotted path of the module in the model.
        module: Module as it is wrapped.
        parts: Parts that are in it.
        names: Plain names of its weights.
        save_frozen_weights: Whether parameters that do not require grad are saved.
    """

    path: str
    module: nn.Module
    parts: list[Part]
    names: PlainNames
    save_frozen_weights: bool

    @cached_property
    def holds_fsdp1(self) -> bool:
        """Whether a module in it is wrapped by FSDP1."""
        return any(is_fsdp1(module) for module in self.module.modules())

    @cached_property
    def requires_grad(self) -> dict[str, bool]:
        """Whether each parameter requires grad, by its plain key, at the moment of the first call."""
        parameters = self.module.named_parameters(remove_duplicate=False)
        return {self.names.plain(key): parameter.requires_grad for key, parameter in parameters}

    def is_parameter(self, key: str, value: object) -> bool:
        """Whether this is a parameter, also where a `state_dict` of the user's gives it a name of its own."""
        return key in self.requires_grad or self._is_itself(key, value)

    def is_frozen(self, key: str, value: object) -> bool:
        """Whether a plain key is one of a parameter that is left out, since it does not require grad."""
        if self.save_frozen_weights:
            return False
        if isinstance(value, nn.Parameter) and self._is_itself(key, value):
            return not value.requires_grad  # its key may be the name of another one
        if key in self.requires_grad:
            return not self.requires_grad[key]
        # A flat FSDP1 parameter hides the names in it, and is frozen or not as a whole, so the innermost unit decides.
        around = [path for path in self._flat_parameters if key.startswith(path)]
        return bool(around) and key not in self._buffers and not self._flat_parameters[max(around, key=len)]

    def _is_itself(self, key: str, value: object) -> bool:
        """Whether a value is a parameter of the module, and none that its `state_dict` makes, or that is a buffer."""
        return isinstance(value, nn.Parameter) and value in self._parameters and key not in self._buffers

    @cached_property
    def _parameters(self) -> set[nn.Parameter]:
        return set(self.module.parameters())

    @cached_property
    def _flat_parameters(self) -> dict[str, bool]:
        """Whether each flat parameter requires grad, by the prefix of the plain keys in its unit."""
        flat = {name: grad for name, grad in self.requires_grad.items() if f".{name}".endswith(f".{_FLAT}")}
        return {name.removesuffix(_FLAT): grad for name, grad in flat.items()}

    @cached_property
    def _buffers(self) -> set[str]:
        return {self.names.plain(key) for key, _ in self.module.named_buffers(remove_duplicate=False)}

    def path_of(self, part: Part) -> str:
        """Return the prefix of the keys of `part` in this module: empty, or a path that ends with a dot."""
        inside = part.path[len(self.path) :].lstrip(".")
        return f"{inside}." if inside else ""

    def key_in(self, part: Part, key: str) -> str | None:
        """Return `key` of this module as a key of `part`; `None` if it is not in the part."""
        inside = self.path_of(part)
        if not key.startswith(inside):
            return None
        key = key[len(inside) :]
        return key if part.holds(key) else None


def shard_again(model: nn.Module) -> None:
    """Put the shards back into the modules of FSDP2, where a forward pass has left whole parameters. **Rank-local**.

    The whole ones may have another dtype, and are no place to load into. torch puts the shards back when a module is
    asked for its state dict, unless the module has a parameter only since it is tied to that of another module.
    """
    if "torch.distributed.fsdp" in sys.modules:
        for module in model.modules():
            if is_fsdp2(module):
                module.reshard()


def list_sources(model: nn.Module, parts: Sequence[Part], *, save_frozen_weights: bool) -> list[Source]:
    """Return the sources that contain `parts` of `model`, in the order of the parts. FSDP2 has its shards in it then.

    Raises:
        ConfigError: If a part is no longer in the model.
    """
    shard_again(model)
    sources: dict[str, Source] = {}
    for part in parts:
        along = modules_along(model, part.path)
        if along is None:
            raise ConfigError(
                f"the model has no submodel {part.path!r} any more, which is to be saved. Put it back, or make a "
                "keeper of what the model has now"
            )
        # The weights of a module inside an FSDP1 unit are in the flat parameter of that unit. Only its root has them.
        path, module = next((entry for entry in along if is_fsdp1(entry[1])), along[-1])
        if path not in sources:
            sources[path] = Source(path, module, [], PlainNames(module), save_frozen_weights)
        sources[path].parts.append(part)
    return list(sources.values())


def plain_state_dict(source: Source) -> StateDict:
    """Return the state dict of `source` with plain keys. Its tensors are the parameters themselves. **Rank-local**.

    Raises:
        SnapshotError: If two keys have the same plain key.
    """
    return source.names.plain_state(state_dict_of(source.module, keep_vars=True))

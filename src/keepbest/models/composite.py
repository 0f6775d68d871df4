"""`CompositeModel`: a model made of named submodels, each with its own optimizer and its own file in a snapshot."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from keepbest.errors import ConfigError
from keepbest.models.model import Model
from keepbest.modules.wrappers import unwrap


class CompositeModel(Model):
    """A model whose parameters live in named submodels.

    The submodels are registered as children under their names, so `self.encoder` is the submodel `encoder`, and every
    parameter belongs to exactly one of them. A submodel may be a `CompositeModel` itself.

    Args:
        submodels: Modules by name. Names are Python identifiers.

    Raises:
        ConfigError: If there is no submodel, or a name cannot be registered.
    """

    def __init__(self, submodels: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not submodels:
            raise ConfigError(f"{type(self).__name__} needs at least one submodel")
        for name, submodel in submodels.items():
            if not name.isidentifier() or hasattr(self, name):
                raise ConfigError(
                    f"{type(self).__name__}: {name!r} cannot name a submodel; it must be an identifier that is not yet "
                    "an attribute of the model"
                )
            self.add_module(name, submodel)
        self._submodel_names = tuple(submodels)

    @property
    def submodels(self) -> dict[str, nn.Module]:
        """The submodels by name, in their order. FSDP1 may have wrapped them. **Rank-local**."""
        return {name: self.get_submodule(name) for name in self._submodel_names}

    def leaves(self) -> dict[str, nn.Module]:
        """Return the submodels that are not composites, by dotted name, as in `autoencoder.decoder`. **Rank-local**."""
        found: dict[str, nn.Module] = {}
        for name, submodel in self.submodels.items():
            inner = unwrap(submodel)
            if isinstance(inner, CompositeModel):
                found.update({f"{name}.{child}": leaf for child, leaf in inner.leaves().items()})
            else:
                found[name] = submodel
        return found

"""The base classes of models: the trainer can train them, and their parts can be saved one by one."""

from keepbest.models.composite import CompositeModel
from keepbest.models.model import Model
from keepbest.modules.wrappers import unwrap

__all__ = ["CompositeModel", "Model", "unwrap"]

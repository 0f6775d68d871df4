"""What a model must offer so that the trainer can train it and its parts can be saved one by one."""

from keepbest.models.composite import CompositeModel
from keepbest.models.model import Model
from keepbest.modules.wrappers import unwrap

__all__ = ["CompositeModel", "Model", "unwrap"]

"""The control plane: tiny collectives by which the ranks agree on facts."""

from keepbest.ranks.flag import SharedFlag
from keepbest.ranks.ranks import Number, Ranks

__all__ = ["Number", "Ranks", "SharedFlag"]

"""The control plane: small collectives by which the ranks agree on facts."""

from keepbest.ranks.carrier import is_of_gloo
from keepbest.ranks.failure import NO_REMEDY
from keepbest.ranks.flag import SharedFlag
from keepbest.ranks.frame import Number
from keepbest.ranks.ranks import LONGEST_TIMEOUT, Ranks

__all__ = ["LONGEST_TIMEOUT", "NO_REMEDY", "Number", "Ranks", "SharedFlag", "is_of_gloo"]

"""From a model, however it is wrapped and sharded, to state dicts of full CPU tensors on rank 0."""

from keepbest.snapshot.gather import StateDict, Weights, plain_state_dict, take_snapshot
from keepbest.snapshot.selection import Part, select_parts

__all__ = ["Part", "StateDict", "Weights", "plain_state_dict", "select_parts", "take_snapshot"]

"""From a model, however it is wrapped and sharded, to state dicts of full CPU tensors on rank 0, and back."""

from keepbest.snapshot.gather import Weights, take_snapshot
from keepbest.snapshot.place import place_weights
from keepbest.snapshot.selection import Part, select_parts
from keepbest.snapshot.source import StateDict
from keepbest.snapshot.staging import Staging, StagingBuffer

__all__ = ["Part", "Staging", "StagingBuffer", "StateDict", "Weights", "place_weights", "select_parts", "take_snapshot"]

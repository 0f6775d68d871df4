"""From a model, however it is wrapped and sharded, to state dicts of full CPU tensors on rank 0, and back."""

from keepbest.snapshot.gather import Weights, take_snapshot
from keepbest.snapshot.place import compare, place_weights
from keepbest.snapshot.selection import Part, select_parts
from keepbest.snapshot.sharded import quiet, sharded_fsdp1_state, sharded_state_dict, take_shards
from keepbest.snapshot.source import Source, StateDict, list_sources
from keepbest.snapshot.staging import Staging, StagingBuffer

__all__ = [
    "Part",
    "Source",
    "Staging",
    "StagingBuffer",
    "StateDict",
    "Weights",
    "compare",
    "list_sources",
    "place_weights",
    "quiet",
    "select_parts",
    "sharded_fsdp1_state",
    "sharded_state_dict",
    "take_shards",
    "take_snapshot",
]

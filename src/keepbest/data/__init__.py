"""Datasets, and the loaders that divide them among the ranks for training and evaluation."""

from keepbest.data.container import Collator, DataContainer, MapDataset
from keepbest.data.device import move_to_device
from keepbest.data.evaluation import EvaluationLoader, evaluation_indices
from keepbest.data.gather import Results, gather_in_dataset_order
from keepbest.data.interleaved import (
    BatchRequest,
    InterleavedSampler,
    SamplerConfig,
    build_loader,
    count_updates_per_epoch,
)

__all__ = [
    "BatchRequest",
    "Collator",
    "DataContainer",
    "EvaluationLoader",
    "InterleavedSampler",
    "MapDataset",
    "Results",
    "SamplerConfig",
    "build_loader",
    "count_updates_per_epoch",
    "evaluation_indices",
    "gather_in_dataset_order",
    "move_to_device",
]

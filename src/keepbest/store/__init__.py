"""The run folder: snapshots, refs and the ledger, written and read by rank 0."""

from keepbest.store.names import best_ref, tolerance_ref
from keepbest.store.shared import SharedRun
from keepbest.store.store import Store
from keepbest.store.takeover import LoadedState

__all__ = ["LoadedState", "SharedRun", "Store", "best_ref", "tolerance_ref"]

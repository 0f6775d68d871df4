"""The run folder: snapshots, refs and the ledger, written and read by rank 0."""

from keepbest.store.store import LoadedState, Store

__all__ = ["LoadedState", "Store"]

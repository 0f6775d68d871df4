"""The run folder: snapshots, refs and the ledger, written and read by rank 0."""

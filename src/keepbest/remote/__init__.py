"""A copy of a run in a remote storage."""

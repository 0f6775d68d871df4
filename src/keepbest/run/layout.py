"""Where things lie in a run folder.

<run>/checkpoints/
  snapshots/E7_U140_S8960/   encoder.pt  decoder.pt  snapshot.json
  best_model.loss.val.total              -> snapshots/E7_U140_S8960
  best_model.loss.val.total.tolerance=2  -> snapshots/E3_U60_S3840
  ledger.jsonl
  lock
"""

CHECKPOINTS = "checkpoints"
SNAPSHOTS = "snapshots"
LEDGER = "ledger.jsonl"
LOCK = "lock"
REFS = "best_model.*"
MANIFEST = "snapshot.json"
TEMPORARY = ".tmp-"

"""Where things lie in a run folder.

<run>/checkpoints/
  snapshots/E7_U140_S8960/   encoder.pt  decoder.pt  snapshot.json
  best_model.loss.val.total              -> snapshots/E7_U140_S8960
  best_model.loss.val.total.tolerance=2  -> snapshots/E3_U60_S3840
  ledger.jsonl
  lock
"""

from pathlib import Path

from keepbest.run.names import REF_PREFIX

CHECKPOINTS = "checkpoints"
SNAPSHOTS = "snapshots"
LEDGER = "ledger.jsonl"
LOCK = "lock"
REFS = f"{REF_PREFIX}*"
MANIFEST = "snapshot.json"
TEMPORARY = ".tmp-"


def snapshots_folder(directory: Path) -> Path:
    """Folder of the snapshots of the run in `directory`."""
    return directory / CHECKPOINTS / SNAPSHOTS


def unfinished_folder(snapshots: Path, name: str) -> Path:
    """Where a snapshot is written in the folder of the snapshots, until it is complete and has its name."""
    return snapshots / f"{TEMPORARY}{name}"

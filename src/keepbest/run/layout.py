"""Where things lie in a run folder.

<run>/checkpoints/
  snapshots/E7_U140_S8960/   encoder.pt  decoder.pt  snapshot.json
  best_model.loss.val.total              -> snapshots/E7_U140_S8960
  best_model.loss.val.total.tolerance=2  -> snapshots/E3_U60_S3840
  resume.latest                          -> snapshots/E8_U160_S10240
  ledger.jsonl
  lock
"""

import re
from pathlib import Path

from keepbest.run.names import REF_PREFIX, RESUME_PREFIX

CHECKPOINTS = "checkpoints"
SNAPSHOTS = "snapshots"
LEDGER = "ledger.jsonl"
LOCK = "lock"
MANIFEST = "snapshot.json"
TEMPORARY = ".tmp-"

_OF_SYSTEM = re.compile(r"\.DS_Store|\._.+|\.nfs[0-9a-f]+|\.fuse_hidden[0-9a-f]+")


def snapshots_folder(directory: Path) -> Path:
    """Folder of the snapshots of the run in `directory`."""
    return directory / CHECKPOINTS / SNAPSHOTS


def ledger_path(directory: Path) -> Path:
    """Ledger of the run in `directory`."""
    return directory / CHECKPOINTS / LEDGER


def ledger_exists(directory: Path) -> bool:
    """Whether there is a ledger in `directory`."""
    return ledger_path(directory).is_file()


def ref_paths(folder: Path) -> list[Path]:
    """What lies in `<run>/checkpoints` under a name that a ref can have."""
    return [*folder.glob(f"{REF_PREFIX}*"), *folder.glob(f"{RESUME_PREFIX}*")]


def unfinished_folder(snapshots: Path, name: str) -> Path:
    """Where a snapshot is written in the folder of the snapshots, until it is complete and has its name."""
    return snapshots / f"{TEMPORARY}{name}"


def is_of_system(path: Path) -> bool:
    """Whether something is a file that a file manager, or NFS, leaves where others write. It says nothing of a run.

    Ask only for what no manifest and no ledger names.
    """
    return _OF_SYSTEM.fullmatch(path.name) is not None and not path.is_symlink() and not path.is_dir()

"""Runs with a remote copy, as rank processes and as one process, and what must be true of the copy at any time."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import xxhash
from torch import nn

from keepbest import TrainingIteration
from keepbest.run.history import History
from keepbest.run.lines import decode_line
from tests.kit import child
from tests.kit.runs import Run, set_weights
from tests.kit.seams import use

WIDE = 700_000  # weights, of 4 bytes


def local_files(directory: Path) -> dict[str, bytes]:
    """What a remote copy of the run must hold when it has caught up, by the path below `checkpoints`."""
    folder = directory / "checkpoints"
    paths = [folder / "ledger.jsonl", *(path for path in (folder / "snapshots").rglob("*") if path.is_file())]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def broken_promises(objects: dict[str, bytes]) -> list[str]:
    """The snapshots that the ledger among `objects` keeps, and that are not there, whole, as the ledger knows them."""
    events = map(decode_line, objects.get("ledger.jsonl", b"").splitlines(keepends=True))
    broken = []
    for name in sorted(History.of(events).kept()):
        try:
            manifest = json.loads(objects[f"snapshots/{name}/snapshot.json"])
            for file, about in manifest["files"].items():
                data = objects[f"snapshots/{name}/{file}"]
                if xxhash.xxh3_128(data).hexdigest() != about["digest"]:
                    broken.append(f"{name}/{file} is not whole")
        except KeyError as error:
            broken.append(f"{error} is missing")
    return broken


def ranks_that_keep_bests_until(
    directory: Path, url: str, environment: dict[str, str], signs: Path, *, patience: float = 60.0, **settings
):
    """Each rank observes 9, 8, ... in the steps that the files in `signs` allow: 'cut', 'repaired'; 'end' ends them."""
    os.environ.update(environment)
    with use(directory, patience=patience):
        return _keep_bests(Run(directory, nn.Linear(WIDE, 1), remote=url, tolerances=[1], **settings), signs)


def _keep_bests(run: Run, signs: Path) -> float:
    number = 0
    with run.keeper as keeper:
        for sign in ("cut", "repaired", "end"):
            for _ in range(3):
                number += 1
                set_weights(run.model, number)
                keeper.observe(10.0 - number, TrainingIteration(update=number))
            child.announce(f"before {sign}")
            while not (signs / sign).exists():
                time.sleep(0.01)  # the test makes it, in another process
    return keeper.state.best.value

"""Whether a place that a user gave is a run, or has room for one, and what to give instead. **Rank-local**."""

from __future__ import annotations

import os
from pathlib import Path

from keepbest.errors import ConfigError
from keepbest.listing import listed
from keepbest.run.layout import CHECKPOINTS, ledger_exists, ledger_path


def run_around(place: Path) -> Path | None:
    """The directory of the run in whose folder of checkpoints `place` is, or which it is; `None` if there is none."""
    around = (folder.parent for folder in (place, *place.parents) if folder.name == CHECKPOINTS)
    return next((run for run in around if ledger_exists(run)), None)


def check_can_be_made(directory: Path) -> None:
    """Check that nothing but folders is in the way of `directory`. Raises `ConfigError`."""
    there = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
    if not there.is_dir():
        kind = "a file" if there.exists() else "a link to nothing"
        raise ConfigError(f"expected a directory, or room for one, at {directory}; but {there} is {kind}")


def check_is_outside(place: Path) -> None:
    """Check that a file or folder for others is not to be among the checkpoints of a run, where it would be damage.

    Raises:
        ConfigError: If it is.
    """
    if (run := run_around(place) or run_around(place.resolve())) is not None:
        raise ConfigError(f"{place} is among the checkpoints of the run {run}, where only that writes; choose another")


def why_no_run(directory: Path) -> str:
    """Say what `directory` is instead of a run, and what to give in its place."""
    no_run = f"{directory} is not the directory of a run with checkpoints"
    if (run := run_around(directory)) is not None:
        return f"{no_run}: it is inside of one; give the run itself: {run}"
    if not directory.exists():
        return f"{no_run}: there is nothing"
    if not directory.is_dir():
        return f"{no_run}: it is a file"
    inner = sorted(path for path in directory.iterdir() if ledger_exists(path))
    if len(inner) == 1:
        return f"{no_run}: it holds one; give that: {inner[0]}"
    if inner:
        names = listed(path.name for path in inner)
        return f"{no_run}: it holds {len(inner)} runs: {names}; give one of them, such as {inner[0]}"
    return f"{no_run}: {ledger_path(directory)} is missing or empty"

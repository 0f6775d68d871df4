"""What any tolerance would have kept, from the ledger alone, whether the run had it or not. **Rank-local**."""

from __future__ import annotations

import re
from pathlib import Path

from keepbest.cli.console import print_table
from keepbest.cli.curve import patiences
from keepbest.errors import ConfigError, SnapshotError
from keepbest.remote.download import local_copy
from keepbest.run.reader import read_history

_MOST_TOLERANCES = 1000


def parse_tolerances(text: str) -> list[int]:
    """Return the numbers that a text like `0..20` or `1,2,5` names.

    Raises:
        ConfigError: If it has another form, or names too many.
    """
    if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", text):
        found = list(range(int(bounds[1]), int(bounds[2]) + 1))
    elif re.fullmatch(r"\d+(,\d+)*", text):
        found = sorted({int(number) for number in text.split(",")})
    else:
        raise ConfigError(f"tolerances must be like 0..20 or 1,2,5, got {text!r}")
    if not 0 < len(found) <= _MOST_TOLERANCES:
        raise ConfigError(f"expected 1 to {_MOST_TOLERANCES} tolerances, got {len(found)}: {text!r}")
    return found


def print_tolerances(run: Path | str, tolerances: list[int]) -> None:
    """Print for each metric and tolerance the best that it keeps, and whether its weights are on the disk.

    Args:
        run: Directory of the run, or URL of its remote copy.
        tolerances: Tolerances to show.

    Raises:
        SnapshotError: If there is no ledger, or nothing was observed yet.
        LedgerError: If it is damaged or of another format.
    """
    with local_copy(run) as directory:
        history = read_history(directory)
    if history.is_empty:
        raise SnapshotError("nothing was observed in this run yet")
    kept = history.kept()
    rows: list[tuple[str, ...]] = []
    for name, keeper in history.keepers.items():
        for patience in patiences(keeper, tolerances):
            snapshot = None if patience.kept is None else keeper.present.saved.get(patience.kept.iteration)
            value = "" if patience.kept is None else f"{patience.kept.value:.9g}"
            at = "none yet" if patience.kept is None else str(patience.kept.iteration)
            weights = f"snapshots/{snapshot}" if snapshot in kept else "" if patience.kept is None else "removed"
            rows.append(
                (name, str(patience.tolerance), value, at, str(patience.exceeded_at or "not exceeded"), weights)
            )
    headings = ("keeper", "tolerance", "value", "iteration", "exceeded at", "weights")
    print_table(f"what tolerances keep in {run}", headings, rows, right=("tolerance", "value"))

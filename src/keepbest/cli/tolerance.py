"""What any tolerance would have kept, from the ledger alone, whether the run had it or not. **Rank-local**."""

from __future__ import annotations

from pathlib import Path

from keepbest.cli.console import print_table
from keepbest.errors import SnapshotError
from keepbest.reading.run import ToleranceAnswer, open_run


def print_tolerances(run: Path | str, tolerances: list[int]) -> None:
    """Print for each metric and tolerance the best that it keeps, and whether its weights are on the disk.

    Args:
        run: Directory of the run, or URL of its remote copy.
        tolerances: Tolerances to show.

    Raises:
        SnapshotError: If there is no ledger, or nothing was observed yet.
        LedgerError: If it is damaged or of another format.
    """
    found = open_run(run)
    if not any(keeper.observations for keeper in found.keepers.values()):
        raise SnapshotError("nothing was observed in this run yet")
    headings = ("keeper", "tolerance", "value", "iteration", "exceeded at", "weights")
    rows = map(_row, found.tolerances(tolerances))
    print_table(f"what tolerances keep in {run}", headings, rows, right=("tolerance", "value"))


def _row(answer: ToleranceAnswer) -> tuple[str, ...]:
    weights = "removed" if answer.snapshot is None else f"snapshots/{answer.snapshot}"
    value, at = ("", "none yet") if answer.value is None else (f"{answer.value:.9g}", answer.iteration or "")
    exceeded = answer.exceeded_at or "not exceeded"
    return answer.keeper, str(answer.tolerance), value, at, exceeded, "" if answer.value is None else weights

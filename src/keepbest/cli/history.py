"""The history of a run, line by line of its ledger. **Rank-local**, without a process group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich import box
from rich.table import Table

from keepbest.cli.console import console
from keepbest.remote.download import local_copy
from keepbest.run.layout import CHECKPOINTS, LEDGER
from keepbest.run.ledger import Line, read_ledger
from keepbest.run.reader import read_history


def print_history(run: Path | str) -> None:
    """Print every observation of a run, what it led to, and where the run restarted.

    Args:
        run: Directory of the run, or URL of its remote copy.

    Raises:
        SnapshotError: If there is no ledger.
        LedgerError: If it is damaged or of another format.
    """
    with local_copy(run) as directory:
        read_history(directory)
        lines, _ = read_ledger(directory / CHECKPOINTS / LEDGER)
    table = Table(title=f"history of {run}", title_justify="left", box=box.SIMPLE)
    for heading in ("keeper", "iteration", "value", "what followed"):
        table.add_column(heading, justify="right" if heading == "value" else "left", no_wrap=heading == "keeper")
    for row in _rows(lines):
        table.add_row(*row)
    console().print(table)


def _rows(lines: list[Line]) -> Iterator[tuple[str, str, str, str]]:
    for line in lines:
        event, keeper = line["event"], line.get("keeper", "")
        if event == "observation":
            value = line["value"] if isinstance(line["value"], str) else f"{line['value']:.9g}"
            yield keeper, line["iteration"], value, ", ".join(_consequences(line))
        elif event == "session":
            yield "", "", "", f"restart {line['restart']}"
        elif event == "begin" and line["timeline"] is not None:
            yield keeper, line["at"] or "", "", "goes on from here" if line["at"] else "starts over"
        elif event == "end":
            yield keeper, "", "", ", ".join(["training ended", *_moves(line)])


def _consequences(line: Line) -> Iterator[str]:
    if "snapshot" in line:
        yield f"{'new best' if line.get('best', True) else 'one of the best'}, saved as {line['snapshot']}"
    if not line.get("durable", True):
        yield "new best that could not be saved"
    yield from _moves(line)


def _moves(line: Line) -> Iterator[str]:
    keeper = line["keeper"]
    for ref, snapshot in line.get("refs", {}).items():
        if ref != keeper:
            yield f"{ref.removeprefix(f'{keeper}.')} keeps {snapshot}"

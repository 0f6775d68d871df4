"""What the commands print. Nothing of it moves the cursor, changes the terminal or is taken for markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from keepbest.printable import printable

_WIDTH_WITHOUT_TERMINAL = 160


def say(line: str, *, err: bool = False) -> None:
    """Print one line as text: markup and control characters in it have no effect."""
    typer.echo(printable(line), err=err)


def print_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str]) -> None:
    """Print a table. If the output is not a terminal, lines are wide enough for it.

    Args:
        title: Title of the table.
        headings: Headings of the columns. The first column is not wrapped.
        rows: Texts of each row.
        right: Headings of the columns that are aligned to the right.
    """
    table = Table(title=printable(title), title_justify="left", box=box.SIMPLE)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if heading in right else "left", no_wrap=number == 0)
    for row in rows:
        table.add_row(*map(printable, row))
    terminal = _console(None)
    (terminal if terminal.is_terminal else _console(_WIDTH_WITHOUT_TERMINAL)).print(table)


def _console(width: int | None) -> Console:
    return Console(width=width, markup=False, emoji=False, highlight=False)

"""What the commands print. Nothing of it moves the cursor, changes the terminal or is taken for markup."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from keepbest.printable import printable

_WIDTH_WITHOUT_TERMINAL = 160


def say(line: str, *, err: bool = False, keep: str = "") -> None:
    """Print one line as text: markup, and control characters that are not in `keep`, have no effect in it."""
    with _while_it_is_read(sys.stderr if err else sys.stdout):
        typer.echo(printable(line, keep=keep), err=err)


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
    with _while_it_is_read(sys.stdout):
        (terminal if terminal.is_terminal else _console(_WIDTH_WITHOUT_TERMINAL)).print(table)


@contextmanager
def _while_it_is_read(output: TextIO) -> Iterator[None]:
    """End the command where nobody reads on, as after `| head`: there is nobody to say so to."""
    try:
        yield
    except BrokenPipeError as error:
        # What is left in the buffer would be an error again, when the interpreter exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
        raise typer.Exit(1) from error


def _console(width: int | None) -> Console:
    return Console(width=width, markup=False, emoji=False, highlight=False)

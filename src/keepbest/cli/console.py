"""What the commands print. Nothing of it moves the cursor, changes the terminal or is taken for markup."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from textwrap import TextWrapper
from typing import TextIO

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from keepbest.printable import printable

_ANY_WIDTH = 100_000  # of a console that clips nothing


def say(line: str, *, err: bool = False, keep: str = "") -> None:
    """Print one line as text: markup, and control characters that are not in `keep`, have no effect in it."""
    with _while_it_is_read(sys.stderr if err else sys.stdout):
        typer.echo(_encodable(printable(line, keep=keep), sys.stderr if err else sys.stdout), err=err)


def print_table(
    title: str,
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Sequence[str],
    wrapped: Sequence[str] = (),
) -> None:
    """Print a table. On a terminal that is too narrow for it, print its rows as text. Nothing is ever cut off.

    Args:
        title: Title of the table.
        headings: Headings of the columns.
        rows: Texts of each row.
        right: Headings of the columns that are aligned to the right.
        wrapped: Headings of the columns whose texts may be broken between words.
    """
    texts = [tuple(_encodable(printable(text), sys.stdout) for text in row) for row in rows]
    table = Table(box=box.SIMPLE)
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left", no_wrap=heading not in wrapped)
    for row in texts:
        table.add_row(*row)
    terminal, needed = _console(None), _console(_ANY_WIDTH).measure(table)
    say(title)
    if not terminal.is_terminal:
        terminal = _console(needed.maximum)
    elif terminal.width < needed.minimum:
        _say_rows(headings, texts, terminal.width)
        return
    with _while_it_is_read(sys.stdout):
        terminal.print(table)


def _say_rows(headings: Sequence[str], rows: Iterable[Sequence[str]], width: int) -> None:
    """Print each row as text, below its first cell. Rows that follow with the same one, or none, are below it too."""
    lines = TextWrapper(width, initial_indent=" " * 4, subsequent_indent=" " * 6, break_on_hyphens=False)
    lines.break_long_words = False  # somebody may want to copy them
    above = ""
    say("")
    for first, *others in rows:
        if first not in ("", above):
            say(f"  {first}")
            above = first
        cells = "; ".join(f"{heading}: {text}" for heading, text in zip(headings[1:], others, strict=True) if text)
        for line in lines.wrap(cells):
            say(line)
    say("")


def _encodable(text: str, output: TextIO | None) -> str:
    """`text` with escapes in the place of what the encoding of `output` does not have."""
    encoding = (output and output.encoding) or "utf-8"  # one that is closed, or in memory, has none
    return text.encode(encoding, "backslashreplace").decode(encoding)


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

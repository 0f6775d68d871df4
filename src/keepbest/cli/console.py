"""The console that tables are printed on."""

from __future__ import annotations

from rich.console import Console

_WIDTH_WITHOUT_TERMINAL = 160


def console() -> Console:
    """Return the terminal. If the output is not a terminal, lines are wide enough for tables."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=_WIDTH_WITHOUT_TERMINAL)

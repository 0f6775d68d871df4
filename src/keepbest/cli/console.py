"""Where tables are printed."""

from __future__ import annotations

from rich.console import Console

_WIDTH_OF_A_FILE = 160


def console() -> Console:
    """The terminal, or what stands in for it: there, lines are as wide as tables need."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=_WIDTH_OF_A_FILE)

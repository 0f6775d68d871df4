"""How a command runs, on all ranks where it needs them, and the exit status that an error becomes."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import typer
from pydantic import ValidationError

from keepbest.cli.console import say
from keepbest.errors import KeepBestError, PoisonedError, PreemptedError, RankLostError, RankTimeoutError
from keepbest.launch import Process, distributed
from keepbest.printable import printable
from keepbest.validation import describe

# Errors that differ between ranks. All others are the same on every rank, and rank 0 reports them.
_OWN_ERRORS = (RankTimeoutError, RankLostError, PoisonedError)

_LINES = "\n\t"  # of errors, which may be tables


def run_command(command: Callable[[], None], *, timeout: float | None = None, debug: bool) -> None:
    """Run a command, and turn its errors into an exit status. **Collective** with a `timeout`.

    Args:
        command: Function to call.
        timeout: Seconds that a rank waits for the others in a collective of torch's own. `None` runs it in this process
            alone.
        debug: Whether an error is raised as it is, for its traceback.

    Raises:
        typer.Exit: Of status 75 if a signal ended training, and 1 if keepbest or the file system refused something.
    """
    process = Process()
    try:
        if timeout is None:
            command()
            return
        with _modules_here(), distributed(timeout=timedelta(seconds=timeout)) as process:
            level = logging.INFO if process.rank == 0 else logging.WARNING
            logging.basicConfig(level=level, format=f"[rank {process.rank}] %(message)s")
            command()
    except PreemptedError as error:
        if process.rank == 0:
            say(str(error), err=True)
        raise typer.Exit(os.EX_TEMPFAIL) from error
    except (KeepBestError, NotImplementedError, ValidationError, OSError) as error:
        # In training an OSError that is none of ours comes from the user's code, which its traceback shows.
        is_of_user = timeout is not None and isinstance(error, OSError) and not isinstance(error, KeepBestError)
        if is_of_user and isinstance(error, BrokenPipeError):
            typer.echo(
                traceback.format_exc(), err=True
            )  # typer takes it for the end of the output, and would say nothing
        elif debug or is_of_user:
            raise
        elif process.rank == 0 or isinstance(error, _OWN_ERRORS):
            text = "\n".join(describe(error, lambda _: ())) if isinstance(error, ValidationError) else str(error)
            color = None if os.environ.get("NO_COLOR") else typer.colors.RED  # which tables follow by themselves
            typer.secho(f"error: {printable(text, keep=_LINES)}", err=True, fg=color, reset=color is not None)
        raise typer.Exit(1) from error


@contextmanager
def _modules_here() -> Iterator[None]:
    """Let a config name classes of modules in the present folder. `python -m` does so for every command."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)

"""The one place where a test takes hold of what a run does: its files, its clock, its patience."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from keepbest.run.files import Files
from keepbest.saving.open_run import OpenRun


@contextmanager
def use(
    directory: Path,
    *,
    files: Files | None = None,
    clock: Callable[[], float] | None = None,
    patience: float | None = None,
    lock_patience: float | None = None,
) -> Iterator[None]:
    """While the block lasts, what this process opens of the run in `directory` goes by these.

    Args:
        directory: Directory of the run.
        files: Layer by which the run folder is changed.
        clock: Time in seconds, as the upload to a remote copy reads it.
        patience: Seconds after which an upload that gets nowhere is given up.
        lock_patience: Seconds to wait for another process of this host that has the folder.
    """
    given = {"files": files, "clock": clock, "patience": patience, "lock_patience": lock_patience}
    seams = {name: seam for name, seam in given.items() if seam is not None}
    run = OpenRun(directory, **seams)
    # Every keeper in the directory shares it for as long as it is held here.
    assert run.share() is run, f"{directory} is open already"
    yield

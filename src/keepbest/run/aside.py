"""Moves a run out of the way, so that another one can begin in its directory. **Rank-local**."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from keepbest.run.files import Files
from keepbest.run.layout import TEMPORARY

_UNFINISHED = f"{TEMPORARY}unfinished"  # in the place beside, until all is there


def move_aside(directory: Path, names: Sequence[str], files: Files) -> Path:
    """Move what `directory` has under `names` to a free directory beside it, such as `runs/a.1` beside `runs/a`.

    Each is moved in one step, in their order, and to the disk before this returns. A move that was cut off between two
    of them is continued. Nothing else is moved, since the directory may also be that of a framework.

    Returns:
        The directory that has it now.

    Raises:
        OSError: Any refusal of the file system. What was moved by then is in the directory beside.
    """
    here = directory.resolve()  # the place beside a link may be on another disk
    beside = (here.with_name(f"{here.name}.{number}") for number in itertools.count(1))
    to = next(path for path in beside if _is_free(path, here))
    try:
        files.make_folder(to)
        if not os.path.lexists(to / _UNFINISHED):
            files.create(to / _UNFINISHED).close()
        for name in names:
            if os.path.lexists(here / name):
                files.rename(here / name, to / name)
    except OSError as error:  # as where the directory alone can be written, or is a disk of its own
        refusal = f"the run in {here} cannot be moved to {to}, beside it ({error}); choose another directory"
        raise OSError(error.errno, refusal) from error
    files.sync_folder(to)
    files.sync_folder(here)
    files.remove(to / _UNFINISHED)
    return to


def _is_free(path: Path, here: Path) -> bool:
    """Whether nothing is there, or only a part of what is in `here`, from a move that was cut off."""
    if not os.path.lexists(path):
        return True
    if path.is_symlink() or not path.is_dir():
        return False
    try:
        there = {each.name for each in path.iterdir()}
    except PermissionError:  # it is somebody else's
        return False
    return not there or (_UNFINISHED in there and not any(os.path.lexists(here / name) for name in there))

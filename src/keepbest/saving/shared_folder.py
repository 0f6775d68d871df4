"""Whether all ranks see the same run folder, which a format needs that every rank writes."""

from __future__ import annotations

import contextlib
import uuid
from pathlib import Path

from keepbest.ranks import Ranks
from keepbest.run.files import Files
from keepbest.run.layout import CHECKPOINTS, TEMPORARY
from keepbest.run.no_links import check_frame
from keepbest.run.place import check_can_be_made

_REMEDY = "This format needs a run directory on a file system that all hosts share and may write to"


def check_is_shared(directory: Path, files: Files, ranks: Ranks, step: str) -> None:
    """Check that a file that rank 0 makes in the run folder is there for all ranks. **Collective**.

    Args:
        directory: Directory of the run.
        files: Operations that change the folder.
        ranks: Ranks that write into it.
        step: What is being done, in words.

    Raises:
        StorageError: On every rank, if a rank does not see the file.
        ConfigError: On every rank, if a file is in the place of the directory.
    """
    folder = directory / CHECKPOINTS

    def make() -> str:
        name = f"{TEMPORARY}made-by-rank-0-{uuid.uuid4().hex}"
        check_can_be_made(directory)
        check_frame(directory)
        files.make_folder(folder)
        files.create(folder / name).close()
        return name

    token: str = ranks.broadcast(step, make, remedy=_REMEDY, saving=True)

    def see() -> None:
        if not (folder / token).is_file():
            raise OSError(f"{folder} is not the folder of rank 0: it has no {token}")

    try:
        ranks.agree(step, see, remedy=_REMEDY, saving=True)
    finally:
        if ranks.is_main:
            # What is refused here stays until the keeper starts, which removes temporary files.
            with contextlib.suppress(OSError):
                files.remove(folder / token)

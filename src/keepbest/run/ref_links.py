"""The refs of a run folder: relative symbolic links that follow the ledger."""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping
from pathlib import Path

from keepbest.run.files import Files
from keepbest.run.layout import REFS, SNAPSHOTS, TEMPORARY

_logger = logging.getLogger(__name__)
_LINKS_REFUSED = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class RefLinks:
    """The links in `<run>/checkpoints`. **Rank-local**, on rank 0."""

    def __init__(self, files: Files, path: Path) -> None:
        self._files = files
        self._path = path
        self._links_refused = False

    def targets(self) -> set[str]:
        """The snapshots that links in the folder point at, also those that the ledger does not know."""
        return {path.readlink().name for path in self._path.glob(REFS) if path.is_symlink()}

    def move(self, refs: Mapping[str, str | None]) -> None:
        """Point each ref at its snapshot; `None` removes the ref.

        On a file system that refuses links nothing is done: the refs are in the ledger alone then.

        Raises:
            OSError: Any refusal of the file system.
        """
        for name, snapshot in refs.items():
            path, target = self._path / name, f"{SNAPSHOTS}/{snapshot}"
            if snapshot is not None and path.is_symlink() and path.readlink() == Path(target):
                continue
            if snapshot is None or (path.exists() and not path.is_symlink()):
                self._files.remove(path)  # a folder in the place of a link: the run was copied with its links followed
            if snapshot is not None and not self._links_refused:
                self._link(target, path)
        if refs:
            self._files.sync_folder(self._path)

    def restore(self, refs: Mapping[str, str]) -> None:
        """Make the refs exactly these, and remove what a crash left of others.

        Raises:
            OSError: Any refusal of the file system.
        """
        for path in self._path.glob(f"{TEMPORARY}*"):
            self._files.remove(path)
        present = [path.name for path in self._path.glob(REFS)]
        self.move({**dict.fromkeys(present), **refs})

    def _link(self, target: str, path: Path) -> None:
        temporary = path.with_name(f"{TEMPORARY}{path.name}")
        self._files.remove(temporary)
        try:
            self._files.link(target, temporary)
        except OSError as error:
            if error.errno not in _LINKS_REFUSED:
                raise
            self._links_refused = True
            _logger.warning("%s refuses symbolic links; the refs are in the ledger alone", self._path)
            return
        self._files.rename(temporary, path)

"""The refs of a run folder: relative symbolic links that follow the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from keepbest.run.files import Files
from keepbest.run.layout import SNAPSHOTS, TEMPORARY, ref_paths
from keepbest.user_code import Log

_logger = Log(__name__)
_NO_LINK = ""  # what is in the place of a link, such as a folder where the run was copied with its links followed


class RefLinks:
    """The links in `<run>/checkpoints`. **Rank-local**, on rank 0.

    They show what the ledger says and nothing reads them, so a file system that refuses anything here is a warning.
    What lags behind then is tried again each time.
    """

    def __init__(self, files: Files, path: Path) -> None:
        self._files = files
        self._path = path
        self._shown: dict[str, str] | None = None  # what each link says, as far as it is known
        self._is_refused = False

    def targets(self) -> set[str]:
        """The snapshots that links in the folder point at, also those that the ledger does not know."""
        return {path.readlink().name for path in ref_paths(self._path) if path.is_symlink()}

    def restore(self, refs: Mapping[str, str]) -> None:
        """As `show`, in a folder where a crash, or somebody else, may have left anything."""
        self._shown = None
        try:
            for path in self._path.glob(f"{TEMPORARY}*"):
                self._files.remove(path)
        except OSError as error:
            self._warn(error)
        self.show(refs)

    def show(self, refs: Mapping[str, str]) -> None:
        """Make the links exactly these. Those that are right already cost nothing."""
        shown, self._shown = self._shown, None
        try:
            self._move(self._look() if shown is None else shown, refs, is_sure=shown is not None)
        except OSError as error:
            self._warn(error)
            return
        self._shown = {name: _target(snapshot) for name, snapshot in refs.items()}
        self._is_refused = False

    def _move(self, shown: Mapping[str, str], refs: Mapping[str, str], *, is_sure: bool) -> None:
        removed = shown.keys() - refs.keys()
        moved = {name: _target(snapshot) for name, snapshot in refs.items() if shown.get(name) != _target(snapshot)}
        for name in removed:
            self._files.remove(self._path / name)
        for name, target in moved.items():
            if shown.get(name) == _NO_LINK:
                self._files.remove(self._path / name)
            self._link(target, self._path / name)
        if removed or moved or not is_sure:
            self._files.sync_folder(self._path)

    def _link(self, target: str, path: Path) -> None:
        temporary = path.with_name(f"{TEMPORARY}{path.name}")
        try:
            self._files.link(target, temporary)
        except FileExistsError:  # of a rename that was refused
            self._files.remove(temporary)
            self._files.link(target, temporary)
        self._files.rename(temporary, path)

    def _look(self) -> dict[str, str]:
        return {path.name: str(path.readlink()) if path.is_symlink() else _NO_LINK for path in ref_paths(self._path)}

    def _warn(self, error: OSError) -> None:
        if not self._is_refused:
            _logger.warning(
                "%s: the refs are in the ledger alone, since their links are refused: %s", self._path, error
            )
        self._is_refused = True


def _target(snapshot: str) -> str:
    return f"{SNAPSHOTS}/{snapshot}"

"""The folder of a run's resume checkpoints: which are complete, which is the latest, which are outdated."""

from __future__ import annotations

import logging
from pathlib import Path

from keepbest.errors import ConfigError, IterationError
from keepbest.iteration import TrainingIteration
from keepbest.run.files import Files
from keepbest.run.inside import check_own

STATE_FILE = "trainer.pt"
INDEX_FILE = ".metadata"

_logger = logging.getLogger(__name__)
_LATEST = "latest"
_TEMPORARY = ".tmp"


class ResumeFolder:
    """`<run>/resume`. Every method is **rank-local**. Those that change the folder are for rank 0.

    Every rank calls `write` and `sync`.

    A checkpoint is a folder named by its iteration. It is written under a name that ends in `.tmp`, and renamed when it
    is complete. The link `latest` points at the checkpoint that was published last, where links can be made.

    Args:
        run_directory: Directory of the run.

    Attributes:
        path: Path of the folder.
    """

    def __init__(self, run_directory: Path) -> None:
        self.path = run_directory / "resume"
        self._files = Files()
        self._links_are_refused = False

    def temporary(self, name: str) -> Path:
        """The path where the checkpoint `name` is written before it is published."""
        return self.path / (name + _TEMPORARY)

    def begin(self, name: str) -> None:
        """Make an empty folder for the checkpoint `name`.

        Raises:
            SnapshotError: If the folder of the checkpoints is a link.
            OSError: If the file system refuses.
        """
        check_own(self.path)
        self._files.remove(self.temporary(name))
        self._files.make_folder(self.temporary(name))

    def write(self, name: str, file_name: str, content: bytes) -> None:
        """Write a file of the checkpoint `name` durably.

        Raises:
            OSError: If the file system refuses.
        """
        with self._files.create(self.temporary(name) / file_name) as file:
            file.write(content)
            file.sync()

    def sync(self, name: str, file_name: str) -> None:
        """Wait until a file of the checkpoint `name`, which somebody else has written, is on the disk.

        Raises:
            OSError: If the file system refuses.
        """
        self._files.sync_file(self.temporary(name) / file_name)

    def publish(self, name: str, *, keep_last: int | None) -> list[str]:
        """Make the checkpoint `name` visible, then remove outdated ones.

        Args:
            name: Name of a checkpoint that is completely written.
            keep_last: Number of checkpoints to keep; `None` keeps all of this timeline.

        Returns:
            The names of the checkpoints that were removed.

        Raises:
            OSError: If the file system refuses.
        """
        final = self.path / name
        self._files.sync_folder(self.temporary(name))
        if final.exists():  # it belongs to an abandoned timeline
            replaced = self.temporary(f"{name}.replaced")
            self._files.remove(replaced)  # from a process that was killed right here
            self._files.rename(final, replaced)
        self._files.rename(self.temporary(name), final)
        self._files.sync_folder(self.path)
        self._link(name)
        self._files.sync_folder(self.path)
        for leftover in self.path.glob(f"*{_TEMPORARY}"):
            self._files.remove(leftover)
        outdated = self._outdated(name, keep_last)
        for old in outdated:
            self._files.remove(self.path / old)
        return outdated

    def find(self, resume: Path | str) -> Path | None:
        """Find the checkpoint that `resume` means; `None` if that is "auto" and there is none.

        Of links only `latest` is followed, to a checkpoint beside it, and what the caller names itself.

        Raises:
            ConfigError: If there is no complete checkpoint at a path.
            SnapshotError: If the folder of the checkpoints is a link.
        """
        check_own(self.path)
        complete = self._complete()
        if resume == "auto":
            latest = self.path / _LATEST
            newest = self.path / complete[-1] if complete else None
            found = latest if _is_complete(latest) and _target(latest) in complete else newest
            return None if found is None else found.resolve()
        leads_out = Path(resume).name == _LATEST and "/" in _target(Path(resume))
        if leads_out or not _is_complete(Path(resume)):
            raise ConfigError(
                f"no complete resume checkpoint at {resume}; in {self.path} there are: {', '.join(complete) or 'none'}"
            )
        return Path(resume).resolve()

    def _link(self, name: str) -> None:
        link = self.temporary(_LATEST)
        self._files.remove(link)
        try:
            self._files.link(name, link)
        except OSError as error:
            if not self._links_are_refused:
                _logger.warning("%s: no link can be made (%s); 'auto' resumes the last iteration", self.path, error)
            self._links_are_refused = True
            self._files.remove(self.path / _LATEST)  # it names another one
        else:
            latest = self.path / _LATEST
            if not latest.is_symlink():  # a folder, where the run was copied with its links followed
                self._files.remove(latest)
            self._files.rename(link, latest)

    def _outdated(self, newest: str, keep_last: int | None) -> list[str]:
        complete = self._complete()
        # Those of later iterations belong to an abandoned timeline.
        past = [name for name in complete if _update(name) <= _update(newest)]
        kept = past if keep_last is None else past[-keep_last:]
        return [name for name in complete if name not in kept]

    def _complete(self) -> list[str]:
        """The names of the complete checkpoints, oldest iteration first."""
        if not self.path.is_dir():
            return []
        names = [path.name for path in self.path.iterdir() if _is_checkpoint_name(path.name) and not path.is_symlink()]
        found = [name for name in names if _is_complete(self.path / name)]
        return sorted(found, key=_update)


def _is_complete(path: Path) -> bool:
    # torch writes the index last.
    return not path.name.endswith(_TEMPORARY) and (path / INDEX_FILE).is_file() and (path / STATE_FILE).is_file()


def _target(path: Path) -> str:
    return str(path.readlink()) if path.is_symlink() else path.name


def _is_checkpoint_name(name: str) -> bool:
    try:
        return TrainingIteration.parse(name).update is not None
    except IterationError:
        return False


def _update(name: str) -> int:
    return TrainingIteration.parse(name).update or 0

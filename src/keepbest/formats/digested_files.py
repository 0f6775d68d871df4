"""What torch's writer of shards writes into: files that are digested on their way, and on the disk when it is done."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter

from keepbest.formats.torch_file import showing_causes
from keepbest.run.digest import Digest, DigestingFile
from keepbest.run.files import Files


def writer_into(folder: Path, disk: DigestedFiles) -> FileSystemWriter:
    """Torch's writer of the shards in `folder`. It leaves the sync to `disk`, since torch syncs before it flushes."""
    writer = FileSystemWriter(folder, sync_files=False)
    writer.fs = disk
    return writer


class DigestedFiles(FileSystem):
    """The file system of one writer. **Rank-local**.

    Args:
        files: Operations that change the run folder.
        is_waited_for: Whether somebody waits for what is written.

    Attributes:
        digests: Digest of each file that was written, by its name.
    """

    def __init__(self, files: Files, *, is_waited_for: bool) -> None:
        self._files = files
        self._is_waited_for = is_waited_for
        self.digests: dict[str, Digest] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """A new file, which is durable when the block ends. Raises `OSError`."""
        del mode
        with self._files.create(Path(path)) as file:
            sink = DigestingFile(file, is_waited_for=self._is_waited_for)
            with showing_causes():
                yield cast("io.IOBase", _Stream(sink))
            sink.sync()
        self.digests[Path(path).name] = sink.digest

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Give a file another name. Raises `OSError`."""
        self._files.rename(Path(path), Path(new_path))
        self.digests[Path(new_path).name] = self.digests.pop(Path(path).name)


class _Stream:
    """What torch's writer asks of a stream. It is flushed after each tensor, and must not be, for small ones."""

    def __init__(self, sink: DigestingFile) -> None:
        self._sink = sink
        self.write = sink.write  # the same method, since torch calls it forty times for each tensor

    def tell(self) -> int:
        return self._sink.size

    def flush(self) -> None:
        """The end of the block writes what is held."""

    def close(self) -> None:
        """The end of the block closes the file."""

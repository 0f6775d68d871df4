"""The append-only JSON-lines record of a run: the truth after a crash."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from keepbest.errors import LedgerError
from keepbest.iteration import TrainingIteration
from keepbest.run.files import DurableFile, Files

FORMAT = 1
Line = dict[str, Any]
"""JSON values, but for a `TrainingIteration`, which is written as its text."""


def _text(value: object) -> str:
    if isinstance(value, TrainingIteration):
        return str(value)
    raise TypeError(f"a ledger line cannot hold a {type(value).__name__}")


_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":"), default=_text).encode


def read_ledger(path: Path) -> tuple[list[Line], int]:
    """The lines of a ledger, and how many bytes they take; bytes beyond are a line that was torn by a crash.

    A missing file is an empty ledger.

    Raises:
        LedgerError: if a line other than a torn last one cannot be read, or the format is not the one known here.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    lines: list[Line] = []
    whole = 0
    for raw in data.splitlines(keepends=True):
        # Of what was not synced before a power cut, the end may be missing, and a part may have become a hole.
        if not raw.endswith(b"\n") or b"\0" in raw:
            break
        lines.append(_parsed(path, len(lines) + 1, raw))
        whole += len(raw)
    # What follows a line that is waited for was written when that was safe, and all before it.
    if any(_is_waited_for(raw) for raw in data[whole:].splitlines(keepends=True)[1:-1]):
        raise LedgerError(f"{path}, line {len(lines) + 1} is damaged, and later lines were committed: it cannot be cut")
    if lines and (lines[0].get("event") != "run" or lines[0].get("format") != FORMAT):
        raise LedgerError(
            f"{path}, line 1: expected a ledger of format {FORMAT}, found {lines[0]!r}; "
            "it was written by another version of keepbest: use that one"
        )
    return lines, whole


def _is_waited_for(raw: bytes) -> bool:
    """Whether nothing is written after this line before it is on the disk."""
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return isinstance(line, dict) and (line.get("event") not in ("observation", "session") or "refs" in line)


class LedgerFile:
    """Appends lines to a ledger.

    An observation is a fact, whatever the disk says: one that could not be written is written before the next line. A
    commit is true only when it is on the disk: one that could not be written is taken back.
    """

    def __init__(self, files: Files, path: Path, size: int) -> None:
        """Open `path` and cut what lies beyond `size` bytes."""
        self._file: DurableFile = files.append(path)
        self._size = size
        self._unwritten = b""
        self._is_torn = True
        try:
            self._cut()
        except OSError:
            self._file.close()
            raise

    def append(self, line: Line, *, durable: bool, withdraw: bool = False) -> None:
        """Add one line.

        Args:
            line: what to record.
            durable: wait until it, and all lines before it, are on the disk.
            withdraw: if it cannot be written, forget it; else it is written before the next one.

        Raises:
            OSError: whatever the file system answers; the file then ends as it did before, or does so before anything
                else is written (`is_torn`).
        """
        text = _encode(line).encode() + b"\n"
        data = self._unwritten + text
        try:
            self._write(data, durable=durable)
        except OSError:
            self._unwritten = self._unwritten if withdraw else data
            raise
        self._unwritten = b""

    def sync(self) -> None:
        """Make all lines durable, those included that could not be written before. Raises as `append`."""
        self._write(self._unwritten, durable=True)
        self._unwritten = b""

    @property
    def size(self) -> int:
        """The bytes of all lines that were written."""
        return self._size

    @property
    def is_torn(self) -> bool:
        """Whether a line that was refused may still be in the file, since it could not be cut either."""
        return self._is_torn

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, data: bytes, *, durable: bool) -> None:
        if self._is_torn:
            self._cut()
        try:
            self._file.write(data)
            if durable:
                self._file.sync()
        except OSError:
            self._is_torn = True
            with contextlib.suppress(OSError):  # the first refusal is the cause, and the next write tries again
                self._cut()
            raise
        self._size += len(data)

    def _cut(self) -> None:
        self._file.truncate(self._size)
        self._is_torn = False


def _parsed(path: Path, number: int, raw: bytes) -> Line:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise LedgerError(f"{path}, line {number} is damaged: {error}; found {raw[:80]!r}") from error
    if not isinstance(line, dict) or not isinstance(line.get("event"), str):
        raise LedgerError(f"{path}, line {number} is damaged: expected an object with an event, found {raw[:80]!r}")
    return line

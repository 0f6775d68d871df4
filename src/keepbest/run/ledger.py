"""The append-only JSON-lines record of a run: the truth after a crash."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from keepbest.errors import LedgerError
from keepbest.run.events import VERSION, Event, RunBegan, event_to_json, parse_event
from keepbest.run.files import DurableFile, Files

_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
# What a line that is no event makes the parser raise.
_SENSELESS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


def read_ledger(path: Path) -> tuple[list[Event], int]:
    """The events of a ledger, and how many bytes they take. Bytes beyond are a line that a crash has torn.

    A missing file is an empty ledger.

    Raises:
        LedgerError: If a line other than a torn last one cannot be read, or the ledger is of another version.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    events: list[Event] = []
    whole = 0
    for raw in data.splitlines(keepends=True):
        # Of what was not synced before a power cut, the end may be missing, and a part may have become a hole.
        if not raw.endswith(b"\n") or b"\0" in raw:
            break
        events.append(_parsed(path, len(events) + 1, raw))
        whole += len(raw)
    # What follows a line that is waited for was written when that was safe, and all before it.
    if any(_is_waited_for(raw) for raw in data[whole:].splitlines(keepends=True)[1:-1]):
        raise LedgerError(
            f"{path}, line {len(events) + 1} is damaged, and later lines were committed: it cannot be cut"
        )
    if events and not isinstance(events[0], RunBegan):
        raise LedgerError(f"{path}, line 1: expected the beginning of a run, found {events[0]!r}")
    return events, whole


def _parsed(path: Path, number: int, raw: bytes) -> Event:
    try:
        line = json.loads(raw)
        if number == 1 and line["event"] == RunBegan.name and line.get("version") != VERSION:
            raise LedgerError(
                f"{path}, line 1: expected a ledger of version {VERSION}, found {raw[:80]!r}; "
                "it was written by another version of keepbest: use that one"
            )
        return parse_event(line)
    except _SENSELESS as error:
        raise LedgerError(f"{path}, line {number} is damaged: {error!r}; found {raw[:80]!r}") from error


def _is_waited_for(raw: bytes) -> bool:
    """Whether nothing is written after this line before it is on the disk."""
    try:
        return parse_event(json.loads(raw)).is_waited_for
    except _SENSELESS:
        return False


class LedgerFile:
    """Appends lines to a ledger.

    An observation is a fact, also if the disk refuses it: it is then written before the next line. A
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

    def append(self, event: Event, *, durable: bool, withdraw: bool = False) -> None:
        """Add the line of an event.

        Args:
            event: Event to record.
            durable: Whether to wait until it, and all lines before it, are on the disk.
            withdraw: Whether to forget it if it cannot be written; else it is written before the next one.

        Raises:
            OSError: Any refusal of the file system. The file then ends as it did before, or does so before anything
                else is written (`is_torn`).
        """
        text = _encode(event_to_json(event)).encode() + b"\n"
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

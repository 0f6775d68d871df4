"""The append-only JSON-lines record of a run: the truth after a crash."""

from __future__ import annotations

import contextlib
import errno
import json
from pathlib import Path
from typing import Literal, NamedTuple

from keepbest.errors import LedgerError, RankFailedError
from keepbest.run.events import VERSION, Event, RunBegan
from keepbest.run.files import DurableFile, Files
from keepbest.run.layout import TEMPORARY
from keepbest.run.lines import RESTORE, SENSELESS, decode_line, encode_line


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
            f"{path}, line {len(events) + 1} is damaged, and later lines were committed, so it cannot be cut; {RESTORE}"
        )
    if events and not isinstance(events[0], RunBegan):
        raise LedgerError(f"{path}, line 1: expected the beginning of a run, found {events[0]!r}; {RESTORE}")
    if second := next((number for number, event in enumerate(events[1:], 2) if isinstance(event, RunBegan)), None):
        raise LedgerError(
            f"{path}, line {second}: another run begins here, so two ledgers were put into one file; {RESTORE}"
        )
    return events, whole


def _parsed(path: Path, number: int, raw: bytes) -> Event:
    try:
        if number == 1:
            _refuse_other_version(path, raw)
        return decode_line(raw)
    except SENSELESS as error:
        remedy = RESTORE
        if raw.endswith(b"\r\n"):
            remedy = "its lines end as on Windows: a program such as git has changed them, so copy it again, as binary"
        raise LedgerError(f"{path}, line {number} is damaged: {error!r}; found {raw[:80]!r}; {remedy}") from error


def _refuse_other_version(path: Path, raw: bytes) -> None:
    line = json.loads(raw)
    if line["event"] == RunBegan.name and line.get("version") != VERSION:
        raise LedgerError(
            f"{path}, line 1: expected a ledger of version {VERSION}, found {raw[:80]!r}; "
            "it was written by another version of keepbest: use that one"
        )


def _is_waited_for(raw: bytes) -> bool:
    """Whether nothing is written after this line before it is on the disk."""
    try:
        return decode_line(raw).is_waited_for
    except SENSELESS:
        return False


class _Tail(NamedTuple):
    """What follows the bytes of the ledger that are known to be on the disk.

    Attributes:
        start: Number of bytes before it.
        lines: Lines that count, whether they are in the file yet or not.
        written: Number of these lines that are in the file.
        end: Bytes of the file that are as they should be.
    """

    start: int
    lines: list[bytes]
    written: int
    end: int

    @classmethod
    def after(cls, size: int) -> _Tail:
        """An empty one."""
        return cls(size, [], 0, size)


class LedgerFile:
    """Appends lines to a ledger.

    An observation is a fact, also if the disk refuses it: it is then written before the next line. A commit is true
    only when it is on the disk: one that the disk refused is taken back. One that was interrupted, by Ctrl-C for
    example, counts: it may be on the disk, and the weights that it names are.
    """

    def __init__(self, files: Files, path: Path, size: int) -> None:
        """Open `path` and cut what lies beyond `size` bytes."""
        self._files = files
        self._path = path
        self._file: DurableFile = files.append(path)
        # An interruption may come between any two statements. So each of these changes in one step, and the condition
        # is what it would be if the next step never came.
        self._tail = _Tail.after(size)
        self._condition: Literal["whole", "torn", "doubtful"] = "torn"
        self._is_closed = False
        self._replaced: DurableFile | None = None  # the file before, which a call that was interrupted may yet sync
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
            OSError: Any refusal of the file system, or the ledger was removed, replaced or changed by another. The file
                then ends as it did before, or does so before anything else is written (`is_torn`).
            ValueError, TypeError, LookupError, AttributeError, ArithmeticError: If the event could not be read again.
                Nothing is written.
        """
        line = encode_line(event)
        if withdraw:
            self._restore()  # which may write all lines anew, and what is on the disk cannot be withdrawn
        try:
            self._tail.lines.append(line)
            self._write(durable=durable)
        except OSError as error:
            if withdraw:
                self._withdraw(line, error)
            with contextlib.suppress(OSError):  # the first refusal is the cause, and the next line tries again
                self._restore()
            raise

    def owe(self, event: Event) -> None:
        """Write the line of an event before the next one, since nothing can be written now. Raises as `append`."""
        self._tail.lines.append(encode_line(event))

    def sync(self) -> None:
        """Make all lines durable, those included that could not be written before. Raises as `append`."""
        self._write(durable=True)

    def check_is_in_place(self) -> None:
        """Check that nobody has removed, replaced or changed the file. Raises `OSError`."""
        self._restore()
        tail = self._tail
        if not self._file.is_in_place(tail.end) and self._tail is tail and not self.is_torn:
            raise OSError(
                errno.ENOENT,
                "the ledger was removed, replaced or changed while the run was open; put back what was there",
                str(self._path),
            )

    @property
    def size(self) -> int:
        """The bytes of all lines that were written."""
        return self._tail.end

    @property
    def durable_size(self) -> int:
        """The bytes of all lines that are known to be on the disk."""
        return self._tail.start

    @property
    def is_torn(self) -> bool:
        """Whether a line that was refused may still be in the file, since it could not be cut either."""
        return self._condition != "whole"

    def close(self) -> None:
        """Close the file, after what was interrupted or refused before. Raises `OSError` if it is refused again.

        A second call does nothing, unless the first one was interrupted.
        """
        if self._is_closed:
            return
        try:
            if self.is_torn or self._tail.written < len(self._tail.lines):
                self._write(durable=True)
        except OSError:
            self._end()
            raise
        self._end()

    def _end(self) -> None:
        self._file.close()
        if self._replaced is not None:
            self._replaced.close()
        self._is_closed = True

    def _write(self, *, durable: bool) -> None:
        while not self._write_undisturbed(durable=durable):
            pass

    def _write_undisturbed(self, *, durable: bool) -> bool:
        """Write the lines that are missing, unless a handler of a signal writes or cuts lines in the middle.

        Returns whether it did. If not, it must be called again, and begins with what is there then.
        """
        if durable:
            self.check_is_in_place()
        else:
            self._restore()
        tail = self._tail = _Tail(*self._tail)  # each write and cut makes one of its own, by which others see it
        missing = tail.lines[tail.written :]
        data = b"".join(missing)
        newest = _Tail(tail.start, tail.lines, tail.written + len(missing), tail.end + len(data))
        if self._condition != "whole":
            return False
        self._condition = "torn" if self._tail is tail else self._condition
        if self._tail is not tail:
            return False
        self._file.write(data)
        self._tail = newest if self._tail is tail else self._tail
        if self._tail is not newest:  # what was written here may follow the lines of the handler
            self._condition = "torn" if self._condition == "whole" else self._condition
            return False
        if durable:
            tail, newest = newest, _Tail.after(newest.end)
            self._condition = "doubtful"
            self._file.sync()
            self._tail = newest if self._tail is tail else self._tail
            if self._tail is not newest:
                return False
        self._condition = "whole" if self._tail is newest else self._condition
        return True

    def _withdraw(self, line: bytes, error: OSError) -> None:
        start, lines, written, end = self._tail
        at = next((at for at, each in enumerate(lines) if each is line), None)
        if at is None:  # the error is that of a handler of a signal, or such a handler has brought the line to the disk
            raise RankFailedError(f"{self._path} has recorded it; then came {type(error).__name__}: {error}") from error
        after = sum(map(len, lines[at:written]))  # with it, those that a handler added; they are written anew
        del lines[at]
        self._tail = _Tail(start, lines, min(written, at), end - after)

    def _restore(self) -> None:
        """Bring the file back to the lines that count."""
        if self._condition == "torn":
            self._cut()
        elif self._condition == "doubtful":
            self._write_anew()

    def _cut(self) -> None:
        self._tail = _Tail(*self._tail)
        self._file.truncate(self._tail.end)
        self._condition = "whole"

    def _write_anew(self) -> None:
        # After a sync that failed the kernel may believe that its pages are on the disk: a second one proves nothing.
        self._file.truncate(self._tail.end)
        durable = self._file.read(self._tail.start)
        if len(durable) < self._tail.start:
            raise OSError(errno.EIO, "the ledger was cut while the run was open", str(self._path))
        data = durable + b"".join(self._tail.lines)
        temporary = self._path.with_name(f"{TEMPORARY}{self._path.name}")
        self._files.remove(temporary)
        with self._files.create(temporary) as file:
            file.write(data)
            file.sync()
        self._files.rename(temporary, self._path)
        replaced, self._replaced = self._replaced, self._file
        self._file = self._files.append(self._path)
        if replaced is not None:
            replaced.close()
        self._files.sync_folder(self._path.parent)
        self._tail = _Tail.after(len(data))
        self._condition = "whole"

"""Notes between the threads of the ranks, in the rendezvous store of their group. Never a collective."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from torch.distributed import Store  # type: ignore[attr-defined]  # not in its __all__

_CHUNK = 1 << 22  # characters of a note that the store takes in one piece
_PAUSES = 0.002, 0.5  # seconds between two looks for a note, the least and the most
_PAUSE = 0.05  # of the time that it was waited for, so that no wait is much longer than it has to be
_AFTER_A_LOSS = 10.0  # seconds to wait for a note when contact with the other ranks is lost
_AFTER_A_DEATH = 1.0  # seconds to wait for the note of a rank that is gone, which may be on its way
_LOOK = 0.5  # seconds between two looks whether a rank is gone


class Mailbox:
    """Notes by their keys, each posted once. **Rank-local**, from any thread.

    The store is that of the process group, so there is no connection more. Who waits looks again and again, since a
    store that is waited for keeps everybody else of this process waiting.

    Args:
        store: Store that all ranks reach, with a prefix of this mailbox alone.
        patience: Seconds that a note is waited for.
        is_lost: Function that returns whether contact with the other ranks is lost.
        is_gone: Function that returns whether contact with a rank is lost.
    """

    def __init__(
        self, store: Store, patience: float, is_lost: Callable[[], bool], is_gone: Callable[[int], bool]
    ) -> None:
        self._store = store
        self._patience = patience
        self._is_lost, self._is_gone = is_lost, is_gone
        self._end = math.inf
        self._has_hurried = False

    def post(self, key: str, note: str) -> None:
        """Let every rank read `note` under `key`.

        Raises:
            ConnectionError: If the store cannot be reached.
        """
        chunks = [note[start : start + _CHUNK] for start in range(0, len(note), _CHUNK)]
        try:
            for number, chunk in enumerate(chunks):
                self._store.set(f"{key}/{number}", chunk)
            self._store.set(key, str(len(chunks)))
        except RuntimeError as error:
            raise _unreachable(error) from error

    def read(self, key: str, what: str, *, sender: int, since: float) -> str:
        """Wait for the note under `key`, and return it.

        Args:
            key: Key of the note.
            what: What is waited for, in words.
            sender: Rank that posts it.
            since: Moment of the monotonic clock from which patience is counted.

        Raises:
            TimeoutError: If it does not come in time.
            ConnectionError: If the store cannot be reached, or contact with the other ranks, or with that one, is lost.
        """
        self._wait(key, what, sender, since)
        try:
            return "".join(self._store.get(chunk).decode() for chunk in self._chunks(key))
        except RuntimeError as error:
            raise _unreachable(error) from error

    def remove(self, key: str) -> None:
        """Remove the note under `key`, which nobody reads any more.

        Raises:
            ConnectionError: If the store cannot be reached.
        """
        try:
            for each in [*self._chunks(key), key]:
                self._store.delete_key(each)
        except RuntimeError as error:
            raise _unreachable(error) from error

    def hurry(self, patience: float) -> None:
        """From now on wait for `patience` seconds at most, since nobody needs the notes who trains."""
        self._end = min(self._end, time.monotonic() + patience)

    def _chunks(self, key: str) -> list[str]:
        return [f"{key}/{number}" for number in range(int(self._store.get(key)))]

    def _wait(self, key: str, what: str, sender: int, since: float) -> None:
        began, (least, most) = time.monotonic(), _PAUSES
        next_look, gone_at = began + _LOOK, math.inf
        while not self._has(key):
            if self._is_lost() and not self._has_hurried:
                self._has_hurried = True
                self.hurry(_AFTER_A_LOSS)
            now = time.monotonic()
            # Nobody else may notice: this thread is often what the collectives of this rank wait for.
            if now >= next_look and gone_at == math.inf:
                next_look = now + _LOOK
                gone_at = now if self._is_gone(sender) else math.inf
            if now >= gone_at + _AFTER_A_DEATH:
                raise ConnectionError(f"contact with rank {sender} was lost before {what} came")
            if now >= self._end and self._has_hurried:
                raise ConnectionError(f"contact with the other ranks was lost before {what} came")
            if now >= min(self._end, since + self._patience):
                raise TimeoutError(f"{what} did not come within {now - since:.0f} s")
            pause = min(max(least, _PAUSE * (now - began)), most)
            time.sleep(pause)  # the store could wait by itself, and would keep everybody else of this process waiting

    def _has(self, key: str) -> bool:
        try:
            return self._store.check([key])
        except RuntimeError as error:
            raise _unreachable(error) from error


def _unreachable(error: RuntimeError) -> ConnectionError:
    return ConnectionError(f"the store of the process group cannot be reached: {error}")

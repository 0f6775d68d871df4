"""A line on the terminal that shows how far training is."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from keepbest.training.counter import UpdateCounter

_SECONDS_BETWEEN_LINES = 0.2


class Progress:
    """Shows the current iteration on rank 0's terminal; nothing where the output is not a terminal. **Rank-local**.

    Args:
        update_counter: Counter to show.
        is_main: Whether this is rank 0.
    """

    def __init__(self, update_counter: UpdateCounter, *, is_main: bool) -> None:
        self._update_counter = update_counter
        self._is_shown = is_main and sys.stderr.isatty()
        self._next_line = 0.0

    def __enter__(self) -> Progress:
        return self

    def advance(self) -> None:
        """Show the iteration of the update counter, unless a line was shown a moment ago."""
        if self._is_shown and (now := time.monotonic()) >= self._next_line:
            self._next_line = now + _SECONDS_BETWEEN_LINES
            self._show()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_shown:
            self._show()
            sys.stderr.write("\n")

    def _show(self) -> None:
        counter = self._update_counter
        percent = 100 * counter.update // counter.end_update
        sys.stderr.write(f"\r{percent:3d} %  update {counter.update} of {counter.end_update}  {counter.iteration}")
        sys.stderr.flush()

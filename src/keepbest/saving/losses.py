"""What could not be written, until every rank knows it. **Rank-local**, on rank 0."""

from __future__ import annotations

from collections import deque

from keepbest.errors import StorageError
from keepbest.run.follower import Follower
from keepbest.user_code import Log

_logger = Log(__name__)
_REFUSALS = OSError, StorageError  # of the file system here, and of another rank


class Losses:
    """Failures and lost bests of one keeper. A thread may add to them; the training thread takes them.

    Args:
        name: Name of the keeper.
        tolerates: Whether training continues after a failure of the storage.
    """

    def __init__(self, name: str, *, tolerates: bool) -> None:
        self._name = name
        self._tolerates = tolerates
        self._failures: deque[BaseException] = deque()
        self._reported_upload_failure: OSError | None = None
        self._lost_bests = 0
        self._announced = 0

    def add(self, failure: BaseException) -> None:
        """Note that something could not be written; from any thread."""
        # The other ranks are not waiting: it travels with the next exchange, at no cost to quiet intervals.
        self._failures.append(failure)
        if not isinstance(failure, _REFUSALS):
            self.lose_best()  # it may have come before the record, which otherwise has what the disk refuses

    def lose_best(self) -> None:
        """Note that the ranks believe something to be recorded, or on its way, that may not be."""
        self._lost_bests += 1

    def take(self) -> BaseException | None:
        """The next failure, for every rank to raise. Each is taken once; one that is tolerated is logged instead."""
        while self._failures:
            failure = self._failures.popleft()
            if not (self._tolerates and isinstance(failure, _REFUSALS)):
                return failure
            _logger.warning("%s: not written, training continues: %s", self._name, failure)
        return None

    def take_upload(self, copy: Follower | None) -> Exception | None:
        """Why the remote copy lags behind, for every rank to raise. Each failure is taken once."""
        failure = None if copy is None else copy.failure
        if failure is None or failure is self._reported_upload_failure:
            return None
        self._reported_upload_failure = failure
        if not self._tolerates:
            return failure
        _logger.warning("%s: training continues: %s", self._name, failure)
        return None

    def announce(self) -> bool:
        """Whether bests were lost that not all ranks know of; they are about to be announced."""
        self._announced = self._lost_bests
        return self._lost_bests > 0

    def all_know(self) -> None:
        """Every rank knows of the lost bests that were announced."""
        self._lost_bests -= self._announced
        self._announced = 0

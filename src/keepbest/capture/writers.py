"""How the ranks that write a snapshot come together: each is a `Writers`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from keepbest.capture.share import Receipts
from keepbest.formats.format import Receipt
from keepbest.ranks import Ranks
from keepbest.ranks.failure import FailureReport, shared_error
from keepbest.ranks.mailbox import Mailbox

_REMEDY = "Every rank needs room and permission to write in the run directory; everything committed before is intact"


def main_alone(begin: Callable[[], str], write: Callable[[str], Receipt]) -> Receipts:
    """Rank 0 writes everything, when it is asked for the receipt. **Rank-local**."""
    return lambda: [write(begin())]


def nobody(begin: Callable[[], str], write: Callable[[str], Receipt]) -> None:
    """This rank writes nothing. **Rank-local**."""
    del begin, write


@dataclass(frozen=True, slots=True)
class AllNow:
    """Every rank writes its share now, and learns at once if a rank could not. **Collective**.

    Attributes:
        ranks: Ranks that write.
        step: What is being done, in words.
    """

    ranks: Ranks
    step: str

    def __call__(self, begin: Callable[[], str], write: Callable[[str], Receipt]) -> Receipts | None:
        name: str = self.ranks.broadcast(self.step, begin, remedy=_REMEDY, saving=True)
        found = self.ranks.gather_json(self.step, lambda: write(name).to_json(), remedy=_REMEDY, saving=True)
        receipts = [Receipt.from_json(receipt) for receipt in found]
        return (lambda: receipts) if self.ranks.is_main else None


@dataclass(frozen=True, slots=True)
class EachAlone:
    """Every rank writes its share on a thread of its own, and rank 0 hears of each. **Rank-local**, no collective.

    Rank 0 posts the name of the snapshot when its folder is there, and each of the others its receipt. In the place of
    either comes what went wrong.

    Attributes:
        ranks: Ranks that write.
        mailbox: Mailbox of these ranks.
        number: Number of the snapshot among those of this mailbox.
        step: What is being done, in words.
        since: Moment of the monotonic clock at which the weights were captured.
    """

    ranks: Ranks
    mailbox: Mailbox
    number: int
    step: str
    since: float

    def __call__(self, begin: Callable[[], str], write: Callable[[str], Receipt]) -> Receipts:
        return partial(self._lead, begin, write) if self.ranks.is_main else partial(self._follow, write)

    def give_up(self, error: BaseException) -> None:
        """Report that this rank cannot write its share. **Rank-local**."""
        self._post({"failed": self._report(error).to_text()})

    def _lead(self, begin: Callable[[], str], write: Callable[[str], Receipt]) -> list[Receipt]:
        try:
            name = begin()
        except BaseException as error:
            self.give_up(error)
            raise
        self._post({"name": name})
        receipts, failures, mine = dict[int, Receipt](), dict[int, FailureReport](), None
        try:
            receipts[0] = write(name)
        except BaseException as error:  # noqa: BLE001  # raised below, when no rank writes into the folder any more
            mine, failures[0] = error, self._report(error)
        for rank in range(1, self.ranks.world_size):
            try:
                note = self._read(rank, f"the receipt of rank {rank} for its share")
                self.mailbox.remove(self._key(rank))
            except OSError as error:
                failures[rank] = self._report(error)
                continue
            if "failed" in note:
                failures[rank] = FailureReport.from_text(note["failed"])
            else:
                receipts[rank] = Receipt.from_json(note["receipt"])
        if failures:
            shared = shared_error(mine, failures, self.ranks.world_size)
            if shared is mine:
                raise shared
            raise shared from mine
        self.mailbox.remove(self._key(0))
        return [receipts[rank] for rank in range(self.ranks.world_size)]

    def _follow(self, write: Callable[[str], Receipt]) -> list[Receipt]:
        try:
            note = self._read(0, "word from rank 0 that it has made the folder")
            if "failed" not in note:
                self._post({"receipt": write(note["name"]).to_json()})
        except Exception as error:  # noqa: BLE001  # rank 0 raises it on every rank
            self.give_up(error)
        return []

    def _post(self, note: Mapping[str, Any]) -> None:
        self.mailbox.post(self._key(self.ranks.rank), json.dumps(note))

    def _read(self, rank: int, what: str) -> dict[str, Any]:
        note: dict[str, Any] = json.loads(self.mailbox.read(self._key(rank), what, sender=rank, since=self.since))
        return note

    def _key(self, rank: int) -> str:
        return f"{self.number}/{rank}"

    def _report(self, error: BaseException) -> FailureReport:
        return FailureReport.of(self.step, error, _REMEDY)

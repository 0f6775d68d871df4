"""The history of a run, line by line of its ledger. **Rank-local**, without a process group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from keepbest.cli.console import print_table
from keepbest.remote.download import local_copy
from keepbest.run.events import CheckpointSaved, Event, KeeperBegan, KeeperEnded, Observed, SessionBegan
from keepbest.run.layout import CHECKPOINTS, LEDGER
from keepbest.run.ledger import read_ledger
from keepbest.run.reader import read_history


def print_history(run: Path | str) -> None:
    """Print every observation of a run, what it led to, and where the run restarted.

    Args:
        run: Directory of the run, or URL of its remote copy.

    Raises:
        SnapshotError: If there is no ledger.
        LedgerError: If it is damaged or of another format.
    """
    with local_copy(run) as directory:
        read_history(directory)
        events, _ = read_ledger(directory / CHECKPOINTS / LEDGER)
    headings = ("keeper", "iteration", "value", "what followed")
    print_table(f"history of {run}", headings, _rows(events), right=("value",))


def _rows(events: list[Event]) -> Iterator[tuple[str, str, str, str]]:
    for event in events:
        match event:
            case Observed():
                yield event.keeper, str(event.iteration), f"{event.value:.9g}", ", ".join(_consequences(event))
            case SessionBegan():
                yield "", "", "", f"restart {event.restart}"
            case KeeperBegan() if event.timeline is not None:
                at = "" if event.at is None else str(event.at)
                yield event.keeper, at, "", "continues from here" if at else "starts over"
            case CheckpointSaved():
                yield "", str(event.iteration), "", f"resume checkpoint, saved as {event.snapshot}"
            case KeeperEnded():
                yield event.keeper, "", "", ", ".join(["training ended", *_moves(event)])


def _consequences(event: Observed) -> Iterator[str]:
    if event.snapshot is not None:
        yield f"{'new best' if event.is_best else 'one of the best'}, saved as {event.snapshot}"
    if event.lost:
        yield "new best that could not be saved"
    yield from _moves(event)


def _moves(event: Observed | KeeperEnded) -> Iterator[str]:
    for ref, snapshot in event.refs.items():
        if ref != event.keeper:
            yield f"{ref.removeprefix(f'{event.keeper}.')} keeps {snapshot}"

"""The history of a run as rows of a table. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from keepbest.iteration import TrainingIteration
from keepbest.run.events import CheckpointSaved, Event, KeeperBegan, KeeperEnded, Moves, Observed, SessionBegan


@dataclass(frozen=True, slots=True)
class HistoryRow:
    """One thing that happened in a run. `pandas.DataFrame` takes a list of these.

    Attributes:
        event: Kind of the event: a value was observed, the run was restarted, a keeper resumed at this iteration, a
            resume checkpoint was saved, or training ended for a keeper.
        keeper: Name of the keeper; `None` where the event is of the whole run.
        metric_key: Key of the metric that it monitors.
        iteration: Training iteration, such as `E7_U140`; `None` where there is none.
        epoch: Epoch of the iteration; `None` if epochs are not counted. The same holds for the next three.
        update: Optimizer update of the iteration.
        sample: Sample of the iteration.
        batch: Batch of the iteration.
        value: Value of the metric, possibly NaN or infinite; `None` unless a value was observed.
        is_new_best: Whether it was a new best whose weights were saved.
        is_lost: Whether it was a new best whose weights could not be saved.
        is_abandoned: Whether a later resume went back to before this observation.
        snapshot: Name of the snapshot that was saved; `None` if there was none.
        restart: Number of restarts of the run until then.
        moves: Snapshot that each ref names from then on, by the name of the ref; `None` removes the ref.
    """

    event: Literal["observation", "restart", "resume", "checkpoint", "end"]
    keeper: str | None = None
    metric_key: str | None = None
    iteration: str | None = None
    epoch: int | None = None
    update: int | None = None
    sample: int | None = None
    batch: int | None = None
    value: float | None = None
    is_new_best: bool = False
    is_lost: bool = False
    is_abandoned: bool = False
    snapshot: str | None = None
    restart: int = 0
    moves: Moves = field(default_factory=dict)


def history_rows(events: Iterable[Event]) -> list[HistoryRow]:
    """Return the rows of the events of a ledger that add up to a history, in their order."""
    events = list(events)
    keys = {event.keeper: event.metric_key for event in reversed(events) if isinstance(event, KeeperBegan)}
    present = _present(events)
    restart, rows = 0, []
    for number, event in enumerate(events):
        if isinstance(event, SessionBegan):
            restart = event.restart
        if (row := _row(event)) is not None:
            key = None if row.keeper is None else keys[row.keeper]
            is_abandoned = isinstance(event, Observed) and number not in present
            rows.append(replace(row, metric_key=key, is_abandoned=is_abandoned, restart=restart))
    return rows


def _row(event: Event) -> HistoryRow | None:
    match event:
        case Observed():
            row = HistoryRow(
                "observation",
                event.keeper,
                value=event.value,
                is_new_best=event.snapshot is not None and event.is_best,
                is_lost=event.lost,
                snapshot=event.snapshot,
                moves=event.refs,
            )
            return _at(event.iteration, row)
        case SessionBegan():
            return HistoryRow("restart")
        case KeeperBegan() if event.timeline is not None:
            return _at(event.at, HistoryRow("resume", event.keeper, moves=event.refs))
        case CheckpointSaved():
            return _at(event.iteration, HistoryRow("checkpoint", snapshot=event.snapshot, moves=event.refs))
        case KeeperEnded():
            return HistoryRow("end", event.keeper, moves=event.refs)
        case _:
            return None


def _at(iteration: TrainingIteration | None, row: HistoryRow) -> HistoryRow:
    if iteration is None:
        return row
    epoch, update, sample, batch = iteration.parts
    return replace(row, iteration=str(iteration), epoch=epoch, update=update, sample=sample, batch=batch)


def _present(events: list[Event]) -> set[int]:
    """Return the positions of the observations that the newest timeline of their keeper has."""
    timelines: dict[str, list[dict[int, TrainingIteration]]] = {}
    for number, event in enumerate(events):
        if isinstance(event, KeeperBegan):
            mine = timelines.setdefault(event.keeper, [])
            at, is_branch = event.at, event.timeline is not None and event.state is None
            shared = mine[event.timeline or 0] if is_branch and at is not None else {}
            mine.append({key: each for key, each in shared.items() if at is not None and not each.follows(at)})
        elif isinstance(event, Observed):
            timelines[event.keeper][-1][number] = event.iteration
    return {number for each in timelines.values() for number in each[-1]}

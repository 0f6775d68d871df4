"""`open_run`: a run that is read and not owned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from keepbest.errors import ConfigError, SnapshotError
from keepbest.printable import printable
from keepbest.reading.activity import Activity, read_activity
from keepbest.reading.checkpoint import Checkpoint, read_checkpoints
from keepbest.reading.curve import Curve, KeptByTolerance, curve, kept_by_tolerances
from keepbest.reading.keepers import KeeperSummary, keeper_summaries
from keepbest.reading.rows import HistoryRow, history_rows
from keepbest.remote.download import local_copy, no_file
from keepbest.remote.storage import is_remote, place_of
from keepbest.remote.verify import verify_run
from keepbest.run.checkpoints import checkpoint_refs
from keepbest.run.events import Event
from keepbest.run.history import History, KeeperHistory
from keepbest.run.layout import CHECKPOINTS, LEDGER
from keepbest.run.names import LATEST
from keepbest.run.reader import read_events
from keepbest.run.verify import Fault

_TRIES = 25  # each takes milliseconds, and a run may exchange its bests as fast as that


@dataclass(frozen=True, slots=True)
class ToleranceAnswer:
    """What early stopping with some tolerance would have kept. `pandas.DataFrame` takes a list of these.

    Attributes:
        keeper: Name of the keeper.
        tolerance: Number of intervals in a row without improvement that do not end training.
        value: Best value at the moment when the tolerance was exceeded, or now; `None` if there is none.
        iteration: Training iteration of that value.
        exceeded_at: Training iteration at which the tolerance was exceeded; `None` if it was not.
        snapshot: Name of the snapshot with these weights; `None` if they are not on the disk any more.
    """

    keeper: str
    tolerance: int
    value: float | None
    iteration: str | None
    exceeded_at: str | None
    snapshot: str | None


class Run:
    """A run as it was when `open_run` read it. **Rank-local**.

    In a notebook it shows its curve and its refs.

    Attributes:
        place: Directory of the run, or the URL of its remote copy.
        id: Id of the run.
        restarts: Number of times that the run was resumed.
        keepers: What each keeper has seen, by its name, in the order in which they began.
        refs: What each ref of a keeper names, by its name: for each keeper the best, the tolerances and the top k.
        resume_refs: Name of the snapshot of each resume checkpoint, by its ref, oldest first; `resume.latest` is the
            last one.
        activity: What the process that works in the run was doing; `None` where none works there, or none can be seen.
    """

    def __init__(self, place: str | Path, events: list[Event], directory: Path) -> None:
        self._events = events
        self._history = History.of(events, directory / CHECKPOINTS / LEDGER)
        self.place = place
        self.id = str(self._history.run_id)
        self.restarts = self._history.restarts
        self.keepers: dict[str, KeeperSummary] = keeper_summaries(self._history)
        self.refs: dict[str, Checkpoint] = {
            # What was read may be a temporary copy.
            ref: each if each.damage is None else replace(each, damage=each.damage.replace(str(directory), str(place)))
            for ref, each in read_checkpoints(directory, self._history).items()
        }
        refs, resume = self._history.refs, checkpoint_refs(self._history)
        self.resume_refs = {ref: refs[ref] for ref in [*resume, LATEST] if ref in refs}
        self.activity: Activity | None = None if is_remote(place) else read_activity(directory)

    def best(self, keeper: str | None = None) -> Checkpoint:
        """Return the best checkpoint of a keeper.

        Args:
            keeper: Name of the keeper, such as `best_model.loss.val.total`; `None` where the run has one.

        Raises:
            ConfigError: If there is no such keeper, or `None` does not say which.
            SnapshotError: If nothing is kept yet.
        """
        names = self._names(keeper)
        if len(names) != 1:
            raise ConfigError(f"{self.place} has {len(names)} keepers; choose one of: {', '.join(names) or 'none yet'}")
        [name] = names
        if name not in self.refs:
            raise SnapshotError(f"{self.place} has no best of {name} yet")
        return self.refs[name]

    def history(self, keeper: str | None = None) -> list[HistoryRow]:
        """Return all that happened in the run, in order: one row for each observation, restart or other event.

        Args:
            keeper: Name of the keeper whose rows are returned; `None` is everything.

        Raises:
            ConfigError: If there is no such keeper.
        """
        names = self._names(keeper)
        return [row for row in history_rows(self._events) if keeper is None or row.keeper in names]

    def tolerances(self, tolerances: Sequence[int], keeper: str | None = None) -> list[ToleranceAnswer]:
        """Return what any tolerance would have kept, whether the run had it or not.

        Args:
            tolerances: Integers >= 0, in intervals.
            keeper: Name of a keeper; `None` is each of them.

        Raises:
            ConfigError: If there is no such keeper, or a tolerance is none.
        """
        kept = self._history.kept()
        return [
            _answer(name, self._history.keepers[name], each, kept)
            for name in self._names(keeper)
            for each in kept_by_tolerances(self._history.keepers[name], tolerances)
        ]

    def verify(self) -> list[Fault]:
        """Compare every byte that the run needs with what was written, as it is now. Returns what is wrong.

        Raises:
            SnapshotError: If there is no run any more, or it cannot be read.
            LedgerError: If the ledger is damaged: then nothing else can be checked.
        """
        return verify_run(self.place)

    def curves(self) -> list[Curve]:
        """Return the curve of each keeper that has observed something.

        Raises:
            SnapshotError: If there is none.
        """
        found = [curve(name, keeper) for name, keeper in self._history.keepers.items() if keeper.present.entries]
        if not found:
            raise SnapshotError("nothing was observed in this run yet")
        return found

    def _names(self, keeper: str | None) -> list[str]:
        if keeper is not None and keeper not in self.keepers:
            known = ", ".join(self.keepers) or "none yet"
            raise ConfigError(f"{self.place} has no keeper {keeper!r}; there are: {known}")
        return list(self.keepers) if keeper is None else [keeper]

    def __repr__(self) -> str:
        bests = [f"{each.metric_key} {each.best} ({each.better} is better)" for each in self.keepers.values()]
        return printable(f"<Run {self.place}: {'; '.join(bests) or 'nothing observed yet'}>")

    def _repr_html_(self) -> str:
        from keepbest.reading.page import fragment  # for notebooks

        return fragment(self)


def open_run(run: str | Path) -> Run:
    """Read a run: what it keeps, and all that it has seen. **Rank-local**.

    It takes no lock and writes nothing, so it may be called on any process, also while the run is trained. The result
    does not change any more: open the run again to see what came later.

    Args:
        run: Directory of the run, or the URL of its remote copy.

    Raises:
        SnapshotError: If there is no run, or it cannot be read.
        LedgerError: If its ledger is damaged or of another version.
        ConfigError: If the URL cannot be opened here.
    """
    place = place_of(run)
    for _ in range(_TRIES):
        with local_copy(place, lambda history: set(history.refs.values()), files=no_file) as directory:
            events = read_events(directory)
            found = Run(place, events, directory)
            # A live run may have removed what its ledger named a moment ago.
            if not any(each.damage for each in found.refs.values()) or len(read_events(directory)) == len(events):
                break
    return found


def _answer(name: str, keeper: KeeperHistory, found: KeptByTolerance, kept: set[str]) -> ToleranceAnswer:
    best = found.kept
    snapshot = None if best is None else keeper.present.saved.get(best.iteration)
    return ToleranceAnswer(
        keeper=name,
        tolerance=found.tolerance,
        value=None if best is None else best.value,
        iteration=None if best is None else str(best.iteration),
        exceeded_at=None if found.exceeded_at is None else str(found.exceeded_at),
        snapshot=snapshot if snapshot in kept else None,
    )

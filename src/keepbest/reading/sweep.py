"""The runs below a folder, such as those of a sweep, the best first. **Rank-local**."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from keepbest.errors import KeepBestError
from keepbest.reading.keepers import KeeperSummary
from keepbest.reading.run import Run, open_run
from keepbest.run.layout import ledger_exists

_DEEPEST = 5  # folders below the one that is looked into


@dataclass(frozen=True, slots=True)
class RankedRun:
    """What one keeper of a run has, among the keepers of this name in other runs.

    Attributes:
        run: Path of the run, below the folder that was looked into.
        keeper: Name of the keeper; `None` where the run has none, or cannot be read.
        metric_key: Metric that it monitors.
        higher_is_better: Direction of the metric.
        place: Place among the runs with a keeper of this name and direction, from 1; `None` where nothing is kept yet.
        value: Value of its best.
        iteration: Training iteration of that.
        observations: Number of observations.
        intervals_since_best: Number of intervals since the last new best.
        state: What happens in it now: "ended", "in use" by a process, or neither, "open".
        error: Reason why the run cannot be read; `None` if it can.
    """

    run: str
    keeper: str | None = None
    metric_key: str | None = None
    higher_is_better: bool | None = None
    place: int | None = None
    value: float | None = None
    iteration: str | None = None
    observations: int = 0
    intervals_since_best: int = 0
    state: str = "open"
    error: str | None = None


def rank_runs(directory: Path) -> list[RankedRun]:
    """Return the runs below `directory`: by keeper and direction, the best first; at the end those without a keeper.

    A run that cannot be read is one of these. Links to folders are followed.

    Raises:
        OSError: If `directory` cannot be read.
    """
    groups: dict[tuple[str, bool], list[RankedRun]] = {}
    others: list[RankedRun] = []
    for path in find_runs(directory):
        name = path.relative_to(directory).as_posix()
        try:
            run = open_run(path)
        except (KeepBestError, OSError) as error:
            others.append(RankedRun(name, error=str(error)))
            continue
        if not run.keepers:
            others.append(RankedRun(name))
        for keeper in run.keepers.values():
            groups.setdefault((keeper.name, keeper.higher_is_better), []).append(_unranked(name, run, keeper))
    ranked = [row for key in sorted(groups) for row in _ranked(groups[key])]
    return [*ranked, *others]


def find_runs(directory: Path) -> list[Path]:
    """Return the directories of runs below `directory`, which is none itself, in the order of their names."""
    return sorted(_walk(directory, _DEEPEST, {directory.resolve()}))


def _walk(directory: Path, depth: int, seen: set[Path]) -> Iterator[Path]:
    for path in sorted(directory.iterdir()):
        if path.name.startswith(".") or not path.is_dir() or (real := path.resolve()) in seen:
            continue
        seen.add(real)
        try:
            if ledger_exists(path):
                yield path
            elif depth > 1:
                yield from _walk(path, depth - 1, seen)
        except FileNotFoundError:  # somebody has just removed it
            continue
        except OSError:  # whoever opens it as a run will report it
            yield path


def _unranked(name: str, run: Run, keeper: KeeperSummary) -> RankedRun:
    """What is kept of a run, whose history may be long, until all of them are read."""
    kept = run.refs.get(keeper.name)
    return RankedRun(
        run=name,
        keeper=keeper.name,
        metric_key=keeper.metric_key,
        higher_is_better=keeper.higher_is_better,
        value=keeper.best,
        iteration=None if kept is None else kept.iteration,
        observations=keeper.observations,
        intervals_since_best=keeper.intervals_since_best,
        state="in use" if run.activity is not None else "ended" if keeper.has_ended else "open",
    )


def _ranked(group: list[RankedRun]) -> Iterator[RankedRun]:
    def order(each: RankedRun) -> tuple[bool, float]:
        best = each.value
        return best is None, 0.0 if best is None else -best if each.higher_is_better else best

    for place, each in enumerate(sorted(group, key=order), start=1):
        yield each if each.value is None else replace(each, place=place)

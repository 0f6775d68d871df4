"""A run as tables for people and as JSON for programs. **Rank-local**, without a process group."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from keepbest.cli.console import print_table, say
from keepbest.reading.activity import Activity
from keepbest.reading.checkpoint import Checkpoint
from keepbest.reading.rows import HistoryRow
from keepbest.reading.run import open_run
from keepbest.reading.sweep import RankedRun, find_runs, rank_runs
from keepbest.remote.storage import is_remote, local_path
from keepbest.run.layout import ledger_exists
from keepbest.run.names import LATEST

_DIGITS_SHOWN = 12


def print_checkpoints(run: Path | str) -> None:
    """Print what a run keeps, and what happens in it now, for people; of a folder of runs, which is best.

    Raises as `open_run`.
    """
    if is_folder_of_runs(run):
        _print_runs(local_path(run, "run"))
        return
    found = open_run(run)
    headings = ("ref", "value", "better", "iteration", "tolerance", "files", "bytes", "digest")
    rows = map(_row, found.refs.values())
    print_table(f"checkpoints of {run}", headings, rows, right=("value", "bytes"), wrapped=("tolerance", "files"))
    for keeper in found.keepers.values():
        say(keeper.describe())
    if LATEST in found.resume_refs:
        *refs, _ = found.resume_refs
        say(f"resume checkpoints: {', '.join(refs) or 'none'}; {LATEST} is {found.resume_refs[LATEST]}")
    if found.activity is not None:
        for line in _describe(found.activity):
            say(line)


def print_json(run: Path | str) -> None:
    """Print the checkpoints for programs: a list of one object per ref; of a folder of runs, one per keeper and run.

    Raises as `open_run`.
    """
    _print_objects(rank_runs(local_path(run, "run")) if is_folder_of_runs(run) else open_run(run).refs.values())


def print_history(run: Path | str) -> None:
    """Print every observation of a run, what it led to, and where the run restarted. Raises as `open_run`."""
    headings = ("keeper", "iteration", "value", "what followed")
    rows = map(_history_row, open_run(run).history())
    print_table(f"history of {run}", headings, rows, right=("value",), wrapped=("what followed",))


def print_history_json(run: Path | str) -> None:
    """Print the history for programs: a list of one object per row. Raises as `open_run`."""
    _print_objects(open_run(run).history())


def is_folder_of_runs(run: Path | str) -> bool:
    """Whether `run` is a folder that is no run itself, with runs below it."""
    if is_remote(run) or ledger_exists(directory := local_path(run, "run")):
        return False
    return directory.is_dir() and find_runs(directory) != []


def _print_runs(directory: Path) -> None:
    ranked = rank_runs(directory)
    headings = ("run", "value", "iteration", "observations", "intervals since best", "state")
    numbers = ("value", "observations", "intervals since best")
    for (metric, keeper, higher), group in groupby(
        ranked, lambda each: (each.metric_key, each.keeper, each.higher_is_better)
    ):
        if keeper is not None:
            title = f"{keeper} in {directory}: {metric}, {'higher' if higher else 'lower'} is better"
            print_table(title, headings, map(_run_row, group), right=numbers)
    for each in ranked:
        if each.error is not None:
            say(f"{each.run} cannot be read: {each.error}")
        elif each.keeper is None:
            say(f"{each.run} has no keeper")


def _run_row(each: RankedRun) -> tuple[str, ...]:
    value = "none yet" if each.value is None else f"{each.value:.9g}"
    return each.run, value, each.iteration or "", str(each.observations), str(each.intervals_since_best), each.state


def _print_objects(rows: Iterable[Any]) -> None:
    objects = [{key: _json(value) for key, value in dataclasses.asdict(row).items()} for row in rows]
    say(json.dumps(objects, indent=1, allow_nan=False), keep="\n")


def _json(value: Any) -> Any:
    """Return NaN and infinities as text, as the ledger has them."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _row(each: Checkpoint) -> tuple[str, ...]:
    return (
        each.ref,
        "?" if each.value is None else f"{each.value:.9g}",
        "higher" if each.higher_is_better else "lower",
        each.iteration or "?",
        "" if each.tolerance is None else "exceeded" if each.exceeded else "not exceeded (provisional)",
        _list_files(each.files) if each.damage is None else f"DAMAGED: {each.damage}",
        "?" if each.bytes is None else f"{each.bytes:,}",
        each.digest[:_DIGITS_SHOWN],
    )


def _list_files(files: Collection[str]) -> str:
    """Return the names of files. Files that all ranks wrote are shown as their folder and their number."""
    counts = Counter(name.partition("/")[0] for name in files)
    return ", ".join(name if name in files else f"{name} ({count} files)" for name, count in counts.items())


def _describe(activity: Activity) -> Iterator[str]:
    yield f"in use by process {activity.pid} on {activity.host}"
    for name, size in activity.writing.items():
        yield f"being written: {name}, {size:,} bytes so far"
    if activity.uploading:
        yield f"on the way to {activity.remote}: {', '.join(activity.uploading)}"


def _history_row(row: HistoryRow) -> tuple[str, ...]:
    value = "" if row.value is None else f"{row.value:.9g}"
    return row.keeper or "", row.iteration or "", value, ", ".join(_consequences(row))


def _consequences(row: HistoryRow) -> Iterator[str]:
    match row.event:
        case "restart":
            yield f"restart {row.restart}"
        case "resume":
            yield "starts over" if row.iteration is None else "continues from here"
        case "checkpoint":
            yield f"resume checkpoint, saved as {row.snapshot}"
        case "end":
            yield "training ended"
        case "observation" if row.snapshot is not None:
            yield f"{'new best' if row.is_new_best else 'one of the best'}, saved as {row.snapshot}"
        case "observation" if row.is_lost:
            yield "new best that could not be saved"
    if row.event in ("observation", "end"):
        for ref, snapshot in row.moves.items():
            if ref != row.keeper:
                yield f"{ref.removeprefix(f'{row.keeper}.')} keeps {snapshot}"

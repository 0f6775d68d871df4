"""Runs that are killed again and again, and resumed each time, end as if nothing had happened.

    pytest -s tests/faults/test_kills.py --kills 200 --fault-seed 7

What the ranks do is in `kills`; here is who kills them, and what must hold after each kill.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from keepbest.errors import SnapshotError, StorageError
from keepbest.remote.verify import verify_run
from keepbest.run.layout import CHECKPOINTS, LEDGER
from keepbest.run.manifest import Manifest
from keepbest.run.names import best_ref, tolerance_ref
from keepbest.run.reader import find_ref, find_snapshot, read_history
from keepbest.run.verify import verify
from tests.faults.kills import COMMITS, METRIC, OTHERS, TOLERANCES, UPDATES, Death, Session, train
from tests.kit.pool import Outcome, run_ranks, start_ranks

KILLS_OF_A_RUN = 20
# strategy, whether it saves in the background, format of the snapshots, where
KINDS = (
    ("ddp", False, "torch", "here"),
    ("fsdp2", True, "torch", "with a copy"),
    ("ddp", True, "safetensors", "here"),
    ("fsdp2", False, "torch", "on a bare file system"),
    ("fsdp2", False, "dcp", "here"),
    ("fsdp2", True, "dcp", "here"),
)
BEST = best_ref(METRIC)
SESSION_LIMIT = 60.0  # seconds; one takes about one

Table = dict[str, tuple[str, float]]  # ref -> iteration and value
Weights = dict[str, torch.Tensor]


class Share(NamedTuple):
    """What one test case does of all kills."""

    strategy: str
    async_save: bool
    file_format: str
    where: str
    number: int
    kills: int


@dataclass(frozen=True)
class Timed:
    """A rank is killed from outside, some time after it said how far it is."""

    rank: int
    said: str
    delay: float


@dataclass(frozen=True)
class Reference:
    """A run that was never interrupted."""

    losses: dict[str, float]
    weights: dict[str, Weights]
    table: Table
    ending: dict[str, Any]


@dataclass
class Killings:
    """Counts what was done to the runs."""

    counts: Counter[str] = field(default_factory=Counter)
    places: Counter[str] = field(default_factory=Counter)
    survivors: Counter[str] = field(default_factory=Counter)

    def add(self, where: list[str], survivors: list[Outcome]) -> None:
        self.counts.update(kills=1, recoveries=1)
        self.counts["kills inside a commit"] += where[0] in COMMITS
        self.places[" ".join(where[:2])] += 1
        self.survivors.update(type(each.exception).__name__ if each.failed else "a result" for each in survivors)

    def __str__(self) -> str:
        counts, places, survivors = (
            ", ".join(f"{count} {name}" for name, count in sorted(each.items()))
            for each in (self.counts, self.places, self.survivors)
        )
        return f"{counts}\n  killed at: {places}\n  survivors ended with: {survivors}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kills = metafunc.config.getoption("--kills")
    count = max(len(KINDS), math.ceil(kills / KILLS_OF_A_RUN))
    shares = [kills * (number + 1) // count - kills * number // count for number in range(count)]
    runs = [Share(*KINDS[number % len(KINDS)], number, share) for number, share in enumerate(shares)]
    names = [
        f"{run.strategy}-{'async' if run.async_save else 'sync'}-{run.file_format}-{run.where}-{run.number}"
        for run in runs
    ]
    metafunc.parametrize("share", runs, ids=names)


@pytest.fixture(scope="session")
def killings() -> Iterator[Killings]:
    total = Killings()
    started = time.monotonic()
    yield total
    print(f"\nin all, in {time.monotonic() - started:.0f} s: {total}")


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    made: dict[str, Reference] = {}

    def make(strategy: str) -> Reference:
        if strategy not in made:
            made[strategy] = uninterrupted(tmp_path_factory.mktemp(strategy), strategy)
        return made[strategy]

    return make


def uninterrupted(folder: Path, strategy: str) -> Reference:
    session = new_session(folder, strategy)
    ending, _ = run_ranks(train, 2, replace(session, records_weights=True))
    losses = {iteration: value for iteration, value, _ in witnessed(session)}
    weights = {path.stem: torch.load(path, weights_only=True) for path in session.notes.glob("*.pt")}
    assert len(losses) == len(weights) == UPDATES
    table = refs(session)
    assert table == table_by_hand(losses)
    assert verify(session.directory) == []
    reference = Reference(losses, weights, table, ending)
    check_snapshots(session, reference)
    return reference


def table_by_hand(losses: dict[str, float]) -> Table:
    """Also sees to it that the losses are worth a test."""
    best, counter, table, improvements = ("", math.inf), 0, {}, 0
    for iteration, loss in losses.items():
        if loss < best[1]:
            best, counter, improvements = (iteration, loss), 0, improvements + 1
        else:
            counter += 1
        for tolerance in TOLERANCES:
            if counter > tolerance:
                table.setdefault(tolerance_ref(BEST, tolerance), best)
    assert improvements > UPDATES / 2
    assert len(set(table.values()) - {best}) == len(TOLERANCES) - 1, "each tolerance is exceeded before the best"
    return {BEST: best, **{tolerance_ref(BEST, tolerance): best for tolerance in TOLERANCES}, **table}


def new_session(
    folder: Path, strategy: str, *, async_save: bool = False, file_format: str = "torch", where: str = "here"
) -> Session:
    notes = folder / "notes"
    notes.mkdir(parents=True)
    remote = (folder / "copy").as_uri() if where == "with a copy" else None
    is_bare = where == "on a bare file system"
    return Session(folder / "run", notes, strategy, async_save, file_format, remote, is_bare)


def witnessed(session: Session) -> list[list[Any]]:
    """[iteration, loss, value of the best] of each interval that a rank went through."""
    return (
        [json.loads(line) for line in session.witnessed.read_text().splitlines()] if session.witnessed.exists() else []
    )


def refs(session: Session) -> Table:
    history = read_history(session.directory)
    names = [ref for ref in history.refs if ref.startswith(BEST)]
    manifests = {ref: find_ref(session.directory, history, ref).manifest for ref in names}
    return {ref: (str(manifest.iteration), manifest.value) for ref, manifest in manifests.items()}


def stored_weights(folder: Path, manifest: Manifest) -> Weights:
    """By nothing but the libraries that the formats come from."""
    weights: Weights = {}
    for part in (saved.name for saved in manifest.saved_parts):
        if (path := folder / f"{part}.pt").exists():
            state = torch.load(path, weights_only=True)
        elif (path := folder / f"{part}.safetensors").exists():
            state = safetensors.torch.load_file(path)
        else:
            with tempfile.NamedTemporaryFile() as file:
                dcp_to_torch_save(folder / f"{part}.dcp", file.name)
                state = torch.load(file.name, weights_only=True)
        weights |= {name if part == "model" else f"{part}.{name}": tensor for name, tensor in state.items()}
    return weights


def assert_same(weights: Weights, expected: Weights) -> None:
    assert weights.keys() == expected.keys()
    assert [name for name, tensor in weights.items() if not torch.equal(tensor, expected[name])] == []


def deal(random_: random.Random, kills: int, ending: dict[str, Any]) -> Iterator[Death | Timed]:
    """The kills of a run: half of them at random operations of commits, the last one at its very end."""
    commits = ["save"] * 6 + ["tolerance", "checkpoint", "checkpoint", "checkpoint"]
    kinds = ["commit", "timed", "commit", "begin", "commit", "timed", "commit", "commit", "commit", "timed"]
    deck = [kinds[card % len(kinds)] for card in range(kills - 1)]
    random_.shuffle(deck)
    for kind in [*deck, "end"]:
        place = random_.choice(commits) if kind == "commit" else kind
        if place == "timed":
            said, longest = random_.choice([("started", 2 * ending["start"]), ("training", 5 * ending["update"])])
            yield Timed(random_.randrange(2), said, random_.uniform(0.0, longest))
        else:
            operation, times = random_.choice(sorted({**COMMITS, **OTHERS}[place].items()))
            moment = random_.choice(("before", "halfway", "after"))
            yield Death(place, operation, moment, random_.randint(1, times if place == "end" else 2 * times))


def attempt(session: Session, kill: Death | Timed | None) -> list[Outcome]:
    """How the ranks ended."""
    session.killed_at.unlink(missing_ok=True)
    with start_ranks(train, 2, replace(session, death=kill if isinstance(kill, Death) else None)) as ranks:
        if isinstance(kill, Timed):
            ranks.wait_for(kill.rank, kill.said, timeout=SESSION_LIMIT)
            time.sleep(kill.delay)  # decides what the kill hits, not whether the test is right
            # Before the ranks are all connected nothing tells the others that one is gone: their launcher ends them.
            for rank in (kill.rank,) if kill.said == "training" else (kill.rank, 1 - kill.rank):
                with contextlib.suppress(ProcessLookupError):  # it has ended by itself in the meantime
                    ranks.signal(rank, signal.SIGKILL)
                ranks.processes[rank].join(SESSION_LIMIT)
        return ranks.collect(SESSION_LIMIT)


def killed(outcomes: list[Outcome]) -> list[Outcome]:
    """Those that were killed, unless all of them were through with the run."""
    is_cut_off = any(outcome.failed for outcome in outcomes)
    return [outcome for outcome in outcomes if is_cut_off and outcome.exit_code == -signal.SIGKILL]


def check_after_kill(session: Session, reference: Reference) -> None:
    ledger = session.directory / CHECKPOINTS / LEDGER
    lines = ledger.read_bytes().splitlines(keepends=True) if ledger.exists() else []
    events = [json.loads(line) for line in lines if line.endswith(b"\n")]
    committed = [event["value"] for event in events if event["event"] == "observation" and "snapshot" in event]
    seen_durable = [best for _, _, best in witnessed(session) if math.isfinite(best)]
    assert session.async_save or set(seen_durable) <= set(committed)
    if not events:
        with pytest.raises(SnapshotError):
            verify(session.directory)
        return
    assert [fault for fault in verify(session.directory) if fault.kind == "damage"] == []
    if committed:
        assert refs(session)[BEST][1] == min(committed)
    check_snapshots(session, reference)


def check_snapshots(session: Session, reference: Reference) -> None:
    """Whatever a ref, or the state in a resume checkpoint, names is there, with the right weights."""
    history = read_history(session.directory)
    kept = {}
    for snapshot in history.kept():
        folder, manifest = find_snapshot(session.directory, history, snapshot)
        if manifest.value is not None:
            kept[str(manifest.iteration)] = manifest.value
        assert_same(stored_weights(folder, manifest), reference.weights[str(manifest.iteration)])
    assert kept.items() <= reference.losses.items()
    for snapshot in history.checkpoints.keys() & history.kept():
        path = find_snapshot(session.directory, history, snapshot).folder / "callbacks.pt"
        states = torch.load(path, weights_only=True)["state"]
        [state] = [each["keeper"]["state"] for key, each in states.items() if METRIC in key]
        named = {best["iteration"] for best in (state["best"], *state["exceeded"].values()) if best is not None}
        assert named <= kept.keys(), f"{path} needs snapshots that are gone"


def check_end(session: Session, reference: Reference, outcomes: list[Outcome]) -> None:
    assert refs(session) == reference.table
    if session.remote is not None:
        assert verify_run(session.remote) == []
    assert verify(session.directory) == []
    for outcome in outcomes:
        assert outcome.result["state"] == reference.ending["state"]
        assert_same(outcome.result["weights"], reference.ending["weights"])
    for iteration, loss, _ in witnessed(session):
        assert loss == reference.losses[iteration]
    check_snapshots(session, reference)


def run_with_kills(
    session: Session, deck: Iterator[Death | Timed], reference: Reference, tallies: list[Killings]
) -> None:
    """One run, until it is complete; after the last card of the deck nobody kills it any more."""
    kill = next(deck, None)
    while True:
        outcomes = attempt(session, kill)
        victims = killed(outcomes)
        reports = "\n".join(outcome.traceback or outcome.output for outcome in outcomes)
        # A bare file system is a warning in each session.
        complaints = session.complaints.read_text() if session.complaints.exists() else ""
        assert session.is_bare or not complaints, f"{kill}: {complaints}\n{reports}"
        if not victims:
            assert not any(outcome.failed for outcome in outcomes), f"{kill}: {reports}"
            break
        survivors = [outcome for outcome in outcomes if outcome not in victims]
        for failure in (survivor.exception for survivor in survivors if survivor.failed):
            # Ours, or torch's where it was in the middle of a step of training.
            assert isinstance(failure, RuntimeError), f"{kill}: {reports}"
            assert not isinstance(failure, StorageError), f"{kill}: {reports}"
        where = json.loads(session.killed_at.read_text()) if session.killed_at.exists() else ["any time"]
        try:
            check_after_kill(session, reference)
        except Exception as error:
            raise AssertionError(f"after {kill} at {where}: {error}\n{reports}") from error
        for tally in tallies:
            tally.add(where, survivors)
        kill = next(deck, None)
    check_end(session, reference, outcomes)
    for tally in tallies:
        tally.counts["runs"] += 1


def test_killed_and_resumed_run_ends_like_an_uninterrupted_one(share, reference, killings, tmp_path, request):
    seed, kills = request.config.getoption("--fault-seed"), request.config.getoption("--kills")
    print(f"\n{share.strategy}, run {share.number}: --kills {kills} --fault-seed {seed}")
    random_, expected = random.Random(f"{seed} {share.number}"), reference(share.strategy)
    started, seen = time.monotonic(), Killings()
    while (left := share.kills - seen.counts["kills"]) > 0:
        # A run that is complete before it was killed often enough is followed by another one.
        folder = tmp_path / str(seen.counts["runs"])
        deck = deal(random_, left, expected.ending)
        session = new_session(
            folder, share.strategy, async_save=share.async_save, file_format=share.file_format, where=share.where
        )
        run_with_kills(session, deck, expected, [seen, killings])
        shutil.rmtree(folder)
    print(f"in {time.monotonic() - started:.1f} s: {seen}")
    assert seen.counts["kills inside a commit"] >= 0.3 * share.kills

"""Every short history of the protocol, killed, interrupted or without power at every step: explored, not sampled.

The real `RunFolder` and `KeeperRecord` run on a disk that records each operation. What must follow from a history is
said here a second time, by a model that knows nothing of keepbest.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from keepbest.decision import BestState, Observation, Policy, decide
from keepbest.iteration import TrainingIteration
from keepbest.run.files import Files
from keepbest.run.folder import RunFolder
from keepbest.run.record import KeeperRecord
from keepbest.run.ref_moves import Kept
from keepbest.run.verify import verify
from tests.faults.power_cut import RecordingFiles
from tests.faults.protocol_model import ACTIONS, BEST, TOLERANCE, Model, histories, last_durable, models_of
from tests.faults.test_crash_points import claimed, pending, save
from tests.kit.files import Operation, SteppedFiles, without_waiting

POLICY = Policy(higher_is_better=False, tolerances=(TOLERANCE,))


class Run:
    """The real thing, driven as a keeper drives it."""

    def __init__(self, root: Path, files: Files) -> None:
        self.directory, self.files = root / "run", files
        self.epoch = 0
        self.folder = RunFolder(self.directory, files)
        self.record = KeeperRecord(self.folder, BEST, "loss", POLICY)
        self.state = BestState()

    def begin(self, *, from_ledger: bool = False) -> None:
        self.folder.claim()
        self.state = self.record.begin(from_ledger=from_ledger)

    def do(self, action: str) -> None:
        if action in ("pin", "unpin", "end"):
            acts = {"pin": lambda: self.record.pin("p", self.state), "unpin": lambda: self.record.unpin("p")}
            acts.get(action, lambda: self.record.end(self.state))()
        elif action == "restart":
            self.folder.close()
            self.folder = RunFolder(self.directory, self.files)
            self.record = KeeperRecord(self.folder, BEST, "loss", POLICY)
            self.begin(from_ledger=True)
        else:
            self.epoch += 1
            self.observe(action, 100.0 if action == "quiet" else -float(self.epoch))

    def observe(self, action: str, value: float) -> None:
        record, observation = self.record, Observation(TrainingIteration(epoch=self.epoch), value)
        if action == "lose":
            before, observation = self.state, replace(observation, durable=False)
            state, decision = decide(POLICY, record.revision(POLICY).state, observation)
            record.observe(observation, {each: state.exceeded[each] for each in decision.newly_exceeded})
            record.drop_skipped()
            self.state = record.revision(POLICY).state
            record.close_tolerances({k: best for k, best in self.state.exceeded.items() if k not in before.exceeded})
            return
        state, decision = decide(POLICY, self.state, observation)
        if action == "skip":
            record.supersede(observation)
        elif decision.is_new_best:
            kept = Kept(observation)
            save(record, kept, pending(record, kept, BEST, "torch"))
        else:
            record.observe(observation, {each: state.exceeded[each] for each in decision.newly_exceeded})
        self.state = state

    def close(self) -> None:
        self.folder.close()


def recovered(directory: Path) -> tuple[object, ...]:
    """What a resume finds in a folder, read with json, torch and readlink where it can be."""
    folder = claimed(directory, Files())
    state = KeeperRecord(folder, BEST, "loss", POLICY).begin(from_ledger=folder.history.run_id is not None)
    folder.close()
    assert verify(directory) == []
    kept = [None if best is None else best.iteration.epoch for best in state.exceeded.values()]
    best, last = state.best, state.last_iteration
    return (
        None if best is None else best.iteration.epoch,
        state.tolerance_counter,
        kept,
        None if last is None else last.epoch,
        links_of(directory),
    )


def links_of(directory: Path) -> dict[str, int]:
    """The epoch whose weights are behind each link."""
    refs = {}
    for link in (directory / "checkpoints").glob("best_model.*"):
        manifest = json.loads((link / "snapshot.json").read_text())
        stamp = torch.load(link / "model.pt", weights_only=True)["stamp"].item()
        assert manifest["iteration"] == f"E{int(stamp)}"
        refs[link.name] = int(stamp)
    return refs


@dataclass
class Explorer:
    """Runs each history, and looks at what each step of its last action may leave."""

    root: Path
    states: int = 0
    faults: list[str] = field(default_factory=list)
    known: set[int] = field(default_factory=set)

    def explore(self, actions: tuple[str, ...], make_files=RecordingFiles) -> None:
        with self._place() as place:
            files = make_files(place)
            run, models = Run(place, files), models_of(actions)
            ends = [0]
            for act in (run.begin, *(lambda action=action: run.do(action) for action in actions)):
                act()
                ends.append(len(files.log))
            run.folder.snapshots.finish_removal()
            # Until a better one is committed, all believe that what was skipped will count.
            if (links := links_of(run.directory)) != models[-1].with_skipped("counts").refs():
                self.faults.append(f"{actions}: the links are {links}")
            run.close()
            durable = last_durable(actions)
            for length in range(ends[-2], ends[-1] + 1):
                is_over = length == ends[-1]
                for fates in files.fates(length, random.Random(0), most=2):
                    first = durable if is_over else last_durable(actions[:-1])
                    first = first if fates else len(actions) - (not is_over)
                    self._look(files, length, fates, actions, models[max(first, 0) :])

    def interrupt(self, actions: tuple[str, ...]) -> None:
        """At each operation of the last action, before and after it. The process continues."""
        for number in itertools.count():
            outcomes = [self._interrupted(actions, number, is_after=is_after) for is_after in (False, True)]
            if not any(outcomes):
                return

    def _interrupted(self, actions: tuple[str, ...], number: int, *, is_after: bool) -> bool:
        with self._place() as place:
            step = Interruption(number, is_after=is_after)
            run = Run(place, SteppedFiles(step))
            run.begin()
            for action in actions[:-1]:
                run.do(action)
            run.folder.snapshots.finish_removal()
            step.is_armed = True
            try:
                run.do(actions[-1])
            except KeyboardInterrupt:
                pass
            else:
                step.is_armed = False
                run.close()
                return False
            step.is_armed = False
            self.states += 1
            if actions[-1] == "restart":
                run.do("restart")
            run.state = run.record.revision(POLICY).state
            run.do("best")
            run.close()
            before, after = models_of(actions)[-2:]
            allowed = [model.after("best", run.epoch).summary() for model in (before, after)]
            self._compare(place / "run", allowed, f"{actions} interrupted {step}")
            return True

    def _look(self, files: RecordingFiles, length: int, fates, actions, allowed: list[Model]) -> None:
        disk = files.after_power_cut(length, fates)
        key = hash((disk.describe(files.ROOT), tuple(map(str, allowed))))
        if key in self.known:
            return
        self.known.add(key)
        self.states += 1
        with self._place(is_made=False) as place:
            disk.build(files.ROOT, place)
            (place / "run").mkdir(exist_ok=True)
            summaries = [model.summary() for model in allowed]
            self._compare(place / "run", summaries, f"{actions} cut after {length} with {fates}")

    def _compare(self, directory: Path, allowed: list[tuple[object, ...]], where: str) -> None:
        try:
            found = recovered(directory)
        except Exception as error:  # noqa: BLE001  # any error here is a fault of the protocol
            self.faults.append(f"{where}: {error!r}")
            return
        if found not in allowed:
            self.faults.append(f"{where}: found {found}, allowed {allowed}")

    @contextmanager
    def _place(self, *, is_made: bool = True) -> Iterator[Path]:
        place = self.root / "place" / str(self.states)
        if is_made:
            place = self.root / "recorded"
            place.mkdir(parents=True)
        yield place
        shutil.rmtree(place)


class Interruption:
    """Ctrl-C in one of the operations."""

    def __init__(self, number: int, *, is_after: bool) -> None:
        self._left, self._is_after = number, is_after
        self.is_armed = False
        self._where = ""

    def __call__(self, operation: Operation):
        is_in_main = threading.current_thread() is threading.main_thread()  # the one that signals interrupt
        if not self.is_armed or not is_in_main:
            return without_waiting(operation)
        self._left -= 1
        is_now = self._left == -1
        if is_now:
            self._where = f"{'after' if self._is_after else 'before'} {operation.name} of {operation.path.name}"
        if is_now and not self._is_after:
            raise KeyboardInterrupt
        result = without_waiting(operation)
        if is_now:
            raise KeyboardInterrupt
        return result

    def __str__(self) -> str:
        return self._where


@pytest.fixture
def explorer(tmp_path):
    shared_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else tmp_path) as folder:
        yield Explorer(Path(folder))


@pytest.mark.parametrize("last", ACTIONS)
def test_every_short_history_survives_every_step(last, explorer, request):
    everything = request.config.getoption("--crash-points") == "all"
    started = time.monotonic()
    tried = 0
    longest = 3 if everything else 1 if request.config.getoption("--quick") else 2
    for length in range(1, longest + 1):
        for actions in histories(length):
            if actions[-1] == last:
                explorer.explore(actions)
                tried += 1
                if length < 3 or everything:
                    explorer.interrupt(actions)
    print(f"\n{last}: {tried} histories, {explorer.states} states in {time.monotonic() - started:.0f} s")
    assert explorer.faults == []
    assert tried or longest == 1


class Careless(RecordingFiles):
    """Leaves one step of the protocol out."""

    def __init__(self, root: Path, is_left_out) -> None:
        super().__init__(root)
        record = self._step
        self._step = lambda operation: None if is_left_out(operation) else record(operation)


def _is(name: str, folder: str):
    return lambda operation: operation.name == name and operation.path.name == folder


BROKEN = {
    "weights are synced": _is("sync", "model.pt"),
    "the manifest is synced": _is("sync", "snapshot.json"),
    "the snapshot is synced": lambda operation: operation.name == "sync_folder" and ".tmp-" in operation.path.name,
    "its name is synced": _is("sync_folder", "snapshots"),
    "the line is synced": _is("sync", "ledger.jsonl"),
    "the links are synced": _is("sync_folder", "checkpoints"),
    "the links move": lambda operation: operation.name == "rename" and operation.path.name == BEST,
}


@pytest.mark.parametrize("step", BROKEN)
def test_exploration_finds_a_step_that_is_left_out(step, explorer):
    for length in (1, 2, 3):
        for actions in histories(length):
            if not explorer.faults and set(actions) <= {"best", "quiet", "restart"}:
                explorer.explore(actions, lambda root: Careless(root, BROKEN[step]))
    assert explorer.faults

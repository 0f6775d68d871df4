"""Whatever a power cut leaves of a run folder, recovery finds a state that was committed, and all of it."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import load

from keepbest.capture.plan import plan_layout
from keepbest.capture.share import Share
from keepbest.capture.union import Union
from keepbest.capture.writers import main_alone
from keepbest.decision import BestState, Observation, Policy, decide
from keepbest.formats.registry import find_format
from keepbest.iteration import TrainingIteration
from keepbest.modules.parts import Part
from keepbest.modules.quiet import quiet
from keepbest.ranks import Ranks
from keepbest.run.events import event_to_json
from keepbest.run.files import Files
from keepbest.run.folder import RunFolder
from keepbest.run.ledger import read_ledger
from keepbest.run.lines import encode_line
from keepbest.run.maintenance import repair
from keepbest.run.names import best_ref
from keepbest.run.record import KeeperRecord
from keepbest.run.ref_moves import Kept
from keepbest.run.verify import verify
from keepbest.saving.job import PendingSnapshot, SaveJob
from keepbest.staging.live import LiveSlot
from tests.faults.power_cut import Enter, RecordingFiles, Sync, Write

LOSS, ACCURACY = best_ref("loss"), best_ref("accuracy")
POLICIES = {LOSS: Policy(False, tolerances=(0, 2)), ACCURACY: Policy(True, tolerances=(1,))}
# Droughts that exceed each tolerance, a tie, a NaN, and improvements after.
LOSSES = [5.0, 4.0, 4.0, 6.0, float("nan"), 3.0, 3.5, 2.0]
ACCURACIES = [0.1, 0.1, 0.3, 0.2, 0.2, 0.2, 0.4, 0.4]
RESUMED_AT = 4


def claimed(directory: Path, files: Files) -> RunFolder:
    folder = RunFolder(directory, files)
    folder.claim()
    return folder


def stamped(epoch: int, file_format: str) -> Share:
    """Weights of rank 0 that show which iteration they are of."""
    files, plans, slot = {"model": {"stamp": torch.tensor([float(epoch)])}}, {}, LiveSlot()
    if file_format == "dcp":
        plans = plan_layout(Union({}), files, {"model": {}}, Ranks.connect(), "save").share(slot, files)
        files = {"model": {}}
    return Share((Part("model", ""),), files, {}, slot, main_alone, plans)


def stamp_in(snapshot: Path) -> float:
    """By nothing but torch."""
    if (snapshot / "model.pt").exists():
        return torch.load(snapshot / "model.pt", weights_only=True)["stamp"].item()
    with quiet():
        load({"stamp": (stamp := torch.zeros(1))}, checkpoint_id=snapshot / "model.dcp", no_dist=True)
    return stamp.item()


def pending(record: KeeperRecord, kept: Kept, selection: str, file_format: str) -> PendingSnapshot:
    share = stamped(kept.observation.iteration.epoch, file_format)
    return PendingSnapshot(
        share,
        find_format(file_format),
        kept.observation.iteration,
        kept.observation.value,
        directory=record.folder.path.parent,
        files=record.folder.files,
        selection=selection,
        record=record,
    )


def save(record: KeeperRecord, kept: Kept, snapshot: PendingSnapshot, *, is_first: bool = True) -> None:
    if is_first:
        snapshot.meet(lambda: None)
    SaveJob(kept, snapshot, record, is_first=is_first, on_commit=lambda _: None).run()


def observe(
    record: KeeperRecord,
    states: dict[str, BestState],
    epoch: int,
    value: float,
    *,
    shared: PendingSnapshot | None = None,
    file_format: str,
) -> PendingSnapshot | None:
    observation, keeper = Observation(TrainingIteration(epoch=epoch), value), record.keeper
    states[keeper], decision = decide(POLICIES[keeper], states[keeper], observation)
    if not decision.is_new_best:
        record.observe(observation, {name: states[keeper].exceeded[name] for name in decision.newly_exceeded})
        return None
    kept = Kept(observation)
    snapshot = shared or pending(record, kept, keeper, file_format)
    save(record, kept, snapshot, is_first=shared is None)
    return snapshot


def train(records: list[KeeperRecord], states: dict[str, BestState], epochs: range, file_format: str) -> None:
    loss, accuracy = records
    for epoch in epochs:
        snapshot = observe(loss, states, epoch, LOSSES[epoch - 1], file_format=file_format)
        observe(accuracy, states, epoch, ACCURACIES[epoch - 1], shared=snapshot, file_format=file_format)
        if epoch == RESUMED_AT:
            for each in records:
                each.pin("checkpoint", states[each.keeper])
    for each in records:
        each.end(states[each.keeper])


def record(root: Path, file_format: str) -> RecordingFiles:
    """Two keepers see a whole run, and again from its middle."""
    files = RecordingFiles(root)
    for start in (0, RESUMED_AT):
        folder = claimed(root / "run", files)
        at = TrainingIteration(epoch=start) if start else None
        records = [KeeperRecord(folder, keeper, keeper, POLICIES[keeper]) for keeper in (LOSS, ACCURACY)]
        states = {each.keeper: each.begin(from_ledger=start > 0, at=at) for each in records}
        train(records, states, range(start + 1, len(LOSSES) + 1), file_format)
        folder.close()
    return files


def ledger_lines(files: RecordingFiles) -> list[tuple[int, int, bytes]]:
    """Of each line of the ledger: number of the operation that wrote it, of the one that made it safe, and its text."""
    folder = files.root / "run/checkpoints"
    inode = files.inode_of(folder / "ledger.jsonl")
    entered = (number for number, effect in enumerate(files.log) if isinstance(effect, Enter) and effect.entry == inode)
    visible = files.log.index(Sync(files.inode_of(folder)), next(entered))
    lines = []
    for number, effect in enumerate(files.log):
        if isinstance(effect, Write) and effect.inode == inode:
            synced = (later for later in range(number, len(files.log)) if files.log[later] == Sync(inode))
            lines.append((number, max(visible, next(synced, len(files.log))), effect.data))
    return lines


def check_recovery(run: Path, issued: list[bytes], committed: int) -> None:
    """The folder holds a prefix of the issued lines, with all that were committed, and what follows from it."""
    ledger = run / "checkpoints/ledger.jsonl"
    events, _ = read_ledger(ledger)
    lines = [event_to_json(event) for event in events]
    assert committed <= len(lines) <= len(issued)
    assert [encode_line(event) for event in events] == issued[: len(lines)]
    if not lines:
        folder = claimed(run, Files())
        KeeperRecord(folder, LOSS, "loss", POLICIES[LOSS]).begin()
        folder.close()
        return
    assert [fault for fault in verify(run) if fault.kind == "damage"] == []
    # Also who reads a ref before anybody resumes finds weights behind it.
    assert [path.name for path in run.glob("checkpoints/best_model.*") if not (path / "snapshot.json").exists()] == []
    repair(run)
    assert verify(run) == []

    refs: dict[str, str] = {}
    for line in lines:
        refs.update(line.get("refs", {}))
    expected = {name: snapshot for name, snapshot in refs.items() if snapshot is not None}
    links = {path.name: path.readlink().name for path in run.glob("checkpoints/best_model.*")}
    assert links == expected
    for name, snapshot in expected.items():
        epoch = int(snapshot.partition(".")[0].removeprefix("E"))
        assert stamp_in(run / "checkpoints" / name) == epoch
    for keeper, better in ((LOSS, min), (ACCURACY, max)):
        values = [float(line["value"]) for line in lines if line.get("keeper") == keeper and "snapshot" in line]
        if values:
            manifest = json.loads((run / "checkpoints" / keeper / "snapshot.json").read_text())
            epoch = TrainingIteration.parse(manifest["iteration"]).epoch
            assert (LOSSES if keeper == LOSS else ACCURACIES)[epoch - 1] == better(values)


def check_resume(run: Path, file_format: str) -> None:
    """A resumed run saves again, and leaves nothing unfinished."""
    folder = claimed(run, Files())
    is_new = folder.history.run_id is None
    records = [KeeperRecord(folder, keeper, keeper, POLICIES[keeper]) for keeper in (LOSS, ACCURACY)]
    for each in records:
        each.begin(from_ledger=not is_new)
    better = Kept(Observation(TrainingIteration(epoch=99), -1.0))
    save(records[0], better, pending(records[0], better, "later", file_format))
    folder.close()
    assert verify(run) == []
    assert stamp_in(run / "checkpoints" / LOSS) == 99.0


@pytest.fixture
def fast_folder():
    # The states are built by the thousand, and nothing here depends on a real disk.
    path = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    yield path
    shutil.rmtree(path)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # In pieces, each of which is through well within the time that one test may take.
    pieces = 16 if metafunc.config.getoption("--crash-points") == "all" else 2
    metafunc.parametrize(("piece", "pieces"), [(piece, pieces) for piece in range(pieces)])


@pytest.fixture(scope="module")
def explored():
    counts: list[int] = []
    yield counts
    print(f"\ncrash points: {sum(counts)} states explored, all recovered")


@pytest.mark.parametrize("file_format", ["torch", "dcp"])
def test_every_crash_point_recovers_to_a_committed_state(file_format, piece, pieces, explored, fast_folder, request):
    everything = request.config.getoption("--crash-points") == "all"
    chance = random.Random(f"{request.config.getoption('--fault-seed')} {piece}")
    (fast_folder / "recorded").mkdir()
    files = record(fast_folder / "recorded", file_format)
    lines = ledger_lines(files)
    lengths = range(len(files.log) + 1)[len(files.log) * piece // pieces : len(files.log) * (piece + 1) // pieces + 1]
    lengths = lengths[:: 40 if request.config.getoption("--quick") else 1 if everything else 2]
    seen: set[int] = set()
    for length in lengths:
        issued = [text for written, _, text in lines if written < length]
        committed = sum(synced < length for _, synced, _ in lines)
        for fates in files.fates(length, chance, most=None if everything else 2):
            disk = files.after_power_cut(length, fates)
            state = hash((disk.describe(files.ROOT), committed))
            if state in seen:
                continue
            seen.add(state)
            place = fast_folder / str(len(seen))
            disk.build(files.ROOT, place)
            (place / "run").mkdir(exist_ok=True)
            try:
                check_recovery(place / "run", issued, committed)
                check_resume(place / "run", file_format)
            except BaseException:
                print(f"\nafter {length} of {len(files.log)} operations, with {fates}:")
                raise
            shutil.rmtree(place)
    print(f"\noperations {lengths[0]} to {lengths[-1]} of {len(files.log)}: {len(seen)} states")
    explored.append(len(seen))
    assert len(seen) > len(lengths) // 2  # some operations change nothing that a power cut leaves

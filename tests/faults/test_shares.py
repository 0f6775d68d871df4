"""A best that two ranks write, each on a thread of its own: every operation is refused, the last of a rank, or cut.

The real folder, record, snapshots and notes run here, on one thread: rank 1 works when rank 0 waits for it, or as soon
as it is given the name.
"""

from __future__ import annotations

import contextlib
import errno
import json
import random
import shutil
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter, load
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from keepbest.capture.plan import Layout
from keepbest.capture.share import Share
from keepbest.capture.union import Union
from keepbest.capture.writers import EachAlone
from keepbest.decision import Observation, Policy
from keepbest.formats.registry import find_format
from keepbest.iteration import TrainingIteration
from keepbest.modules.parts import Part
from keepbest.modules.quiet import quiet
from keepbest.ranks.mailbox import Mailbox
from keepbest.run.files import Files
from keepbest.run.folder import RunFolder
from keepbest.run.record import KeeperRecord
from keepbest.run.ref_moves import Kept
from keepbest.run.verify import verify
from keepbest.saving.job import PendingSnapshot, SaveJob
from keepbest.staging.live import LiveSlot
from tests.faults.power_cut import RecordingFiles
from tests.faults.test_protocol import Careless
from tests.kit.files import Operation, SteppedFiles, without_waiting

BEST = "best_model.loss"
POLICY = Policy(higher_is_better=False)


class DiedError(BaseException):
    """Nothing of this rank happens any more."""


def nobody_is_lost(*_):
    return False


class Notes(Mailbox):
    """Those of rank 0, which lets rank 1 work in between."""

    def __init__(self, store, work, *, rank_1_is_first):
        super().__init__(store, 0.0, nobody_is_lost, nobody_is_lost)
        self._work, self._rank_1_is_first = work, rank_1_is_first

    def post(self, key, note):
        super().post(key, note)
        if self._rank_1_is_first:
            self._work()

    def read(self, key, what, *, sender, since):
        self._work()
        return super().read(key, what, sender=sender, since=since)


@dataclass
class Ranks:
    """Two ranks that save bests, and what becomes of rank 1."""

    root: Path
    files: list[Files]
    rank_1_is_first: bool
    epoch: int = 0
    store: HashStore = field(default_factory=HashStore)

    def begin(self):
        self.folder = RunFolder(self.root / "run", self.files[0])
        self.folder.claim()
        self.record = KeeperRecord(self.folder, BEST, "loss", POLICY)
        self.state = self.record.begin(from_ledger=self.folder.is_resumed)
        return self

    def save(self):
        """The next best; rank 0 records it as lost if it cannot be kept."""
        self.epoch += 1
        kept = Kept(Observation(TrainingIteration(epoch=self.epoch), -float(self.epoch)))
        mailboxes = [Mailbox(self.store, 0.0, nobody_is_lost, nobody_is_lost)] * 2

        def work():
            with contextlib.suppress(DiedError):
                others.contribute()  # a second time it does nothing

        mailboxes[0] = Notes(self.store, work, rank_1_is_first=self.rank_1_is_first)
        mine, others = (self._pending(rank, kept, mailboxes[rank]) for rank in (0, 1))
        for snapshot in (mine, others):
            snapshot.meet(lambda: None)
        try:
            SaveJob(kept, mine, self.record, is_first=True, on_commit=lambda _: None).run()
        except Exception:  # whichever it was, as `Saver` does
            self.record.lose(kept.observation)
            self.state = self.record.revision(POLICY).state
            raise

    def _pending(self, rank, kept, mailbox):
        ranks = SimpleNamespace(rank=rank, world_size=2, is_main=rank == 0)
        tensors = {"model": {f"stamp{rank}": torch.tensor([float(self.epoch)])}}
        slot = LiveSlot()
        share = Share(
            (Part("model", ""),),
            {"model": {}},
            {},
            slot,
            EachAlone(ranks, mailbox, self.epoch, "save", 0.0),
            layout(rank).share(slot, tensors),
        )
        record = self.record if rank == 0 else None
        return PendingSnapshot(
            share,
            find_format("dcp"),
            kept.observation.iteration,
            kept.observation.value,
            directory=self.root / "run",
            files=self.files[rank],
            selection="all",
            record=record,
        )


def layout(rank: int) -> Layout:
    """Each rank writes one of two tensors."""
    planners = [DefaultSavePlanner(), DefaultSavePlanner()]
    for number, planner in enumerate(planners):
        planner.set_up_planner({f"stamp{number}": torch.zeros(1)}, is_coordinator=number == 0)
    plans, metadata = planners[0].create_global_plan([planner.create_local_plan() for planner in planners])
    mine = FileSystemWriter("").prepare_global_plan(plans)[rank]
    return Layout(Union({}), {"model": mine}, {"model": metadata}, {"model": {}})


def kept_in(root: Path) -> int:
    """The epoch whose weights are behind the link, whole and from both ranks, read by nothing but torch."""
    link = root / "run/checkpoints" / BEST
    stamps = {f"stamp{rank}": torch.zeros(1) for rank in (0, 1)}
    try:
        with quiet():
            load(stamps, checkpoint_id=link / "model.dcp", no_dist=True)
    except CheckpointException as error:  # which is no Exception
        raise AssertionError(f"{link} cannot be read") from error
    assert json.loads((link / "snapshot.json").read_text())["iteration"] == f"E{int(stamps['stamp0'])}"
    assert torch.equal(*stamps.values())
    return int(stamps["stamp0"])


def after_a_resume(root: Path, *, last: int) -> int:
    """What is kept when the run is resumed; also that the next best is kept, and nothing else is left over."""
    ranks = Ranks(root, [Files(), Files()], rank_1_is_first=True).begin()
    ranks.folder.snapshots.finish_removal()
    assert verify(root / "run") == []
    found = kept_in(root)
    best = ranks.state.best
    assert best is not None
    assert best.iteration.epoch == found
    ranks.epoch = last
    ranks.save()
    ranks.folder.close()
    assert kept_in(root) == last + 1
    assert len(list((root / "run/checkpoints/snapshots").iterdir())) == 1
    assert verify(root / "run") == []
    return found


class Fault:
    """What happens at one operation of one rank."""

    def __init__(self, rank: int, number: int, error: BaseException) -> None:
        self.rank, self.left, self.error = rank, number, error
        self.is_armed = self.is_dead = False
        self.place = ""

    def step_of(self, rank):
        def step(operation: Operation):
            is_in_main = threading.current_thread() is threading.main_thread()
            if self.is_dead and rank == self.rank and not is_in_main:
                raise SystemExit  # as the whole process
            if self.is_armed and rank == self.rank and is_in_main:
                if self.is_dead:
                    raise self.error
                self.left -= 1
                if self.left < 0:
                    self.is_dead, self.place = isinstance(self.error, DiedError), f"{operation.name} {operation.path}"
                    self.is_armed = self.is_dead
                    operation.do_half()
                    raise self.error
            return without_waiting(operation)

        return step


@pytest.fixture
def place():
    shared_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else None) as folder:
        yield Path(folder)


FAULTS = {"refused": OSError(errno.ENOSPC, "No space left on device"), "dies": DiedError()}


def fail_at_each_operation(
    place: Path, rank: int, error: BaseException, *, rank_1_is_first: bool, every: int = 1
) -> list[str]:
    """Where the second best was kept or lost against the rules."""
    faults: list[str] = []
    number = -every
    while True:
        number += every
        root, fault = place / str(number), Fault(rank, number, error)
        ranks = Ranks(root, [SteppedFiles(fault.step_of(each)) for each in (0, 1)], rank_1_is_first).begin()
        ranks.save()
        ranks.folder.snapshots.finish_removal()
        fault.is_armed = True
        allowed = [2]
        try:
            ranks.save()
        except DiedError:
            allowed = [1, 2]  # rank 0 is gone, and nobody else knows
        except Exception as failure:  # noqa: BLE001  # whichever it was, the best is lost
            allowed = [1] if fault.place else []
            fault.place += f" ({failure!r})"
        fault.is_armed = fault.is_dead = False
        ranks.folder.close()
        if not fault.place:
            assert number > 5
            return faults
        try:
            found = after_a_resume(root, last=2)
        except Exception as failure:  # noqa: BLE001  # any error here is a fault of the protocol
            faults.append(f"{fault.place}: {failure!r}")
        else:
            if found not in allowed or (rank == 1 and found == 2):
                faults.append(f"{fault.place}: found {found}, allowed {allowed}")


@pytest.mark.parametrize("rank_1_is_first", [False, True])
@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_that_fails_at_any_operation_costs_one_best(rank, kind, rank_1_is_first, place, request):
    every = 4 if request.config.getoption("--quick") else 1
    assert fail_at_each_operation(place, rank, FAULTS[kind], rank_1_is_first=rank_1_is_first, every=every) == []


def test_power_cut_at_any_operation_leaves_one_best_whole(place, request):
    everything = request.config.getoption("--crash-points") == "all"
    states, faults = explore(place, RecordingFiles, every=1 if everything else 3)
    print(f"\n{states} states")
    assert faults == []
    assert states > 30


def explore(place: Path, make_files, *, every: int = 1, until_a_fault: bool = False) -> tuple[int, list[str]]:
    """Cut the power at every operation of the second best: number of different states, and what is wrong in them."""
    known, faults = set[int](), list[str]()
    for rank_1_is_first in (False, True):
        recorded = place / f"recorded {rank_1_is_first}"
        recorded.mkdir()
        files = make_files(recorded)
        ranks = Ranks(recorded, [files, files], rank_1_is_first).begin()
        ends = []
        for _ in range(2):
            ranks.save()
            ranks.folder.snapshots.finish_removal()
            ends.append(len(files.log))
        ranks.folder.close()
        for length in [*range(*ends, every), ends[-1]]:
            for fates in files.fates(length, random.Random(0), most=3):
                if faults and until_a_fault:
                    return len(known), faults
                disk = files.after_power_cut(length, fates)
                if (key := hash(disk.describe(files.ROOT))) in known:
                    continue
                known.add(key)
                root = place / str(len(known))
                disk.build(files.ROOT, root)
                try:
                    found = after_a_resume(root, last=2)
                except Exception as failure:  # noqa: BLE001  # any error here is a fault of the protocol
                    faults.append(f"after {length} with {fates}: {failure!r}")
                else:
                    if found != 2 and (found != 1 or length == ends[-1]):
                        faults.append(f"after {length} with {fates}: found {found}")
                shutil.rmtree(root)
    return len(known), faults


BROKEN = {
    "a share of rank 1 is synced": lambda operation: operation.name == "sync" and operation.path.name == "__1_0.distcp",
    "the index is synced": lambda operation: operation.name == "sync" and ".metadata" in operation.path.name,
    "the names of the shares are synced": lambda operation: (
        operation.name == "sync_folder" and operation.path.name == "model.dcp"
    ),
}


@pytest.mark.parametrize("step", BROKEN)
def test_exploration_finds_a_step_that_is_left_out(step, place):
    _, faults = explore(place, lambda root: Careless(root, BROKEN[step]), until_a_fault=True)
    assert faults


@pytest.mark.parametrize("what", ["commits before all have written", "takes a failure for a receipt"])
def test_exploration_finds_a_rank_0_that_does_not_wait(what, place, monkeypatch):
    def lead(self, begin, write):
        name = begin()
        self._post({"name": name})
        mine = write(name)
        if what == "takes a failure for a receipt":
            self._read(1, "the receipt")
        return [mine, mine._replace(files={})]

    monkeypatch.setattr(EachAlone, "_lead", lead)
    assert fail_at_each_operation(place, 1, FAULTS["refused"], rank_1_is_first=True)

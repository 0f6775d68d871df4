"""The format page names every key that is written, and is enough to write a reader."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import pytest
from torch import nn

from keepbest import BestKeeper, TrainingIteration
from keepbest.capture.share import Items
from keepbest.decision import Best, BestState, Policy
from keepbest.errors import LedgerError, SnapshotError
from keepbest.modules.parts import Part
from keepbest.ranks import Ranks
from keepbest.run.digest import Digest
from keepbest.run.events import (
    CheckpointSaved,
    Event,
    KeeperBegan,
    KeeperEnded,
    Observed,
    Pinned,
    RefsMoved,
    Rewound,
    RunBegan,
    SessionBegan,
    Unpinned,
    event_to_json,
)
from keepbest.run.manifest import FileRecord, Manifest, SavedPart
from keepbest.run.reader import find_ref, read_history
from keepbest.saving.resume_saver import ResumeSaver
from tests.docs.blocks import ROOT
from tests.docs.independent_reader import Run
from tests.kit.files import Operation, SteppedFiles, before
from tests.kit.seams import use

TEXT = (ROOT / "docs" / "format.md").read_text()
AT = TrainingIteration(epoch=1)
BEST = Best(1.0, AT)
MOVES = {"best_model.a": "E1"}
FULL_EVENTS = [
    RunBegan("a", version=7),
    SessionBegan(1),
    KeeperBegan("best_model.a", "a", Policy(True), 0, AT, BestState(BEST, 1, {2: BEST}, AT, (BEST,)), MOVES, ("E1",)),
    Observed("best_model.a", AT, 1.0, "E1", "00", is_best=False, superseded=True, lost=True, refs=MOVES),
    RefsMoved("best_model.a", MOVES),
    Pinned("best_model.a", "tag", ("E1",)),
    Unpinned("best_model.a", "tag"),
    KeeperEnded("best_model.a", MOVES),
    CheckpointSaved(AT, "E1", "00", ("E1",), {"resume.E1": "E1"}),
    Rewound(("resume.E1",), {"resume.latest": None}),
]
FULL_RECORD = FileRecord("model", Digest(1, "00"), 1)
FULL_MANIFEST = Manifest(
    "a",
    AT,
    "best_model.a",
    "a",
    1.0,
    "torch",
    (SavedPart("model", "", ()),),
    ("optimizer",),
    {"model.pt": FULL_RECORD},
    {},
    9,
    {"model": {"1": 2}},
)


def keys_under(heading: str) -> list[str]:
    """The first column of the table under a heading."""
    section = re.search(rf"^### {re.escape(heading)}\n(.*?)(?=^##|\Z)", TEXT, flags=re.MULTILINE | re.DOTALL)
    assert section, f"there is no heading {heading!r}"
    return re.findall(r"^\| `(\w+)` \|", section[1], flags=re.MULTILINE)


def test_examples_are_all_events_with_all_that_they_can_hold():
    assert {type(event) for event in FULL_EVENTS} == set(get_args(Event))
    for event in FULL_EVENTS:
        for field in dataclasses.fields(event):
            assert getattr(event, field.name) not in (field.default, None, {}), (event, field.name)


@pytest.mark.parametrize("event", FULL_EVENTS, ids=lambda event: event.name)
def test_page_names_every_key_of_an_event(event):
    assert keys_under(f"`{event.name}`") == list(event_to_json(event))


def test_page_names_every_key_inside_an_event():
    [line] = [event_to_json(event) for event in FULL_EVENTS if isinstance(event, KeeperBegan)]
    assert keys_under("The object `policy`") == list(line["policy"])
    assert keys_under("The object `state`") == list(line["state"])
    assert keys_under("The object `best`") == list(line["state"]["best"])


def test_page_names_every_key_of_a_manifest():
    content = json.loads(FULL_MANIFEST.to_bytes())
    assert keys_under("The manifest") == list(content)
    assert keys_under("The record of a file") == list(content["files"]["model.pt"])


SETTINGS = {
    "loss": {"tolerances": [0, 1, 3], "keep_top_k": 2, "min_delta": 0.1, "baseline": 4.96},
    "accuracy/val": {"tolerances": [1], "async_save": True, "id": "b/c", "format": "safetensors"},
    "speed": {"higher_is_better": True, "async_save": True, "tolerances": [1]},
}
VALUES = {
    "loss": [5.0, 4.95, 4.5, 4.0, math.nan, 3.0, 3.5, 3.4],
    "accuracy/val": [0.1, 0.2, 0.15, 0.3, 0.1, 0.2, 0.1, 0.05],
    "speed": [1.0, 0.5, 2.0, 0.5, 3.0, math.inf],
}


def epoch(number: int) -> TrainingIteration:
    return TrainingIteration(epoch=number, update=10 * number)


def start(directory: Path, *metric_keys: str, at: int = 0, **settings) -> list[BestKeeper]:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    keepers = [
        BestKeeper(model, directory=directory, metric_key=key, on_save_error="warn", **SETTINGS[key], **settings)
        for key in metric_keys
    ]
    for keeper in keepers:
        keeper.start(epoch(at) if at else None)
    return keepers


def observe(keepers: Iterable[BestKeeper], *epochs: int) -> None:
    for number in epochs:
        for keeper in keepers:
            keeper.observe(VALUES[keeper.metric_key][number - 1], epoch(number))


class Disk:
    """Refuses one snapshot, and waits with new files where it is told to."""

    def __init__(self) -> None:
        self.may_write, self.is_writing = threading.Event(), threading.Event()
        self.may_write.set()

    def __call__(self, operation: Operation) -> None:
        if operation.name == "create":
            self.is_writing.set()
            assert self.may_write.wait(30)
            if operation.path.parent.name == ".tmp-E4_U40":
                raise OSError(28, "No space left on device")


def lose_a_best(directory: Path) -> None:
    keepers = start(directory, "loss", "accuracy/val")
    observe(keepers, 1, 2, 3, 4, 5, 6)
    for keeper in keepers:
        keeper.flush(pin="middle")
        keeper.close()


def resume_in_the_middle(directory: Path) -> None:
    keepers = start(directory, "loss", "accuracy/val", at=5)
    observe(keepers, 6, 7, 8)
    for keeper in keepers:
        keeper.flush(pin="end")
        keeper.release("middle")
    saver = ResumeSaver(directory, whole(nn.Linear(2, 2)), Ranks.connect(), keep_last=2)
    saver.start(epoch(5), None)
    for number in (6, 7, 8):
        saver.save(epoch(number))
    saver.leave()
    saver.start(epoch(7), directory / "checkpoints/snapshots" / read_history(directory).refs["resume.E7_U70"])
    saver.leave()
    for keeper in keepers:
        keeper.abandon()


def whole(model: nn.Module) -> Items:
    return Items(model, (Part("model", ""),), save_frozen_weights=True)


def supersede_a_best(directory: Path, disk: Disk) -> None:
    [keeper] = keepers = start(directory, "speed", resume="ledger")
    disk.may_write.clear()
    disk.is_writing.clear()
    observe(keepers, 1)
    assert disk.is_writing.wait(30)
    observe(keepers, 2, 3, 4, 5, 6)
    disk.may_write.set()
    keeper.close()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A run with three keepers, two restarts, a lost and a superseded best, and a torn last line."""
    directory, disk = tmp_path_factory.mktemp("run"), Disk()
    with use(directory, files=SteppedFiles(before(disk))):
        lose_a_best(directory)
        resume_in_the_middle(directory)
        supersede_a_best(directory, disk)
    with (directory / "checkpoints" / "ledger.jsonl").open("ab") as ledger:
        ledger.write(b'{"event":"observation","keeper":')
    return directory


def test_run_has_what_is_hard_to_read(directory):
    text = (directory / "checkpoints" / "ledger.jsonl").read_text()
    for hard in (
        '"lost":true',
        '"superseded":true',
        '"value":"nan"',
        '"restart":2',
        ".top=2",
        '"unpin"',
        '"best":false',
        '"checkpoint"',
        '"rewind"',
    ):
        assert hard in text, hard


def test_independent_reader_imports_nothing_of_keepbest():
    source = (ROOT / "tests" / "docs" / "independent_reader.py").read_text()
    imported = {line.split()[1] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imported <= {"__future__", "copy", "hashlib", "json", "math", "pathlib", "re", "xxhash", "zlib"}


def test_independent_reader_agrees_about_refs_and_pins(directory):
    run, history = Run(directory), read_history(directory)
    assert run.refs == history.refs
    assert run.pins == history.pins
    assert run.needs == {name: set(checkpoint.needs) for name, checkpoint in history.checkpoints.items()}
    assert all(run.needs.values())
    assert run.manifests == history.manifests


def test_independent_reader_agrees_about_bests_and_tolerances(directory):
    run, history = Run(directory), read_history(directory)
    assert run.keepers.keys() == history.keepers.keys()
    for name, keeper in history.keepers.items():
        present = keeper.present
        assert run.keepers[name]["best_value"] == keeper.kept_best
        assert run.state(name) == present.state(keeper.policy, until=present.last_iteration).to_json()


def test_independent_reader_agrees_about_verified_files(directory):
    run, history = Run(directory), read_history(directory)
    assert len(run.refs) > 5
    for ref in run.refs:
        found = find_ref(directory, history, ref)
        found.check_files()
        assert run.verified_files(ref) == {found.folder / name for name in found.manifest.files}


@pytest.mark.parametrize("file", ["snapshot.json", "model.safetensors"])
def test_independent_reader_finds_a_changed_byte(directory, tmp_path, file):
    copied = shutil.copytree(directory, tmp_path / "run", symlinks=True)
    ref = "best_model.accuracy.val.id=b.c"
    path = copied / "checkpoints" / ref / file
    *most, last = path.read_bytes()
    path.write_bytes(bytes([*most, last ^ 1]))
    with pytest.raises(ValueError, match="damaged"):
        Run(copied).verified_files(ref)
    with pytest.raises(SnapshotError, match="damaged"):
        find_ref(copied, read_history(copied), ref).check_files()


def test_independent_reader_refuses_a_flipped_digit(directory, tmp_path):
    copied = shutil.copytree(directory, tmp_path / "run", symlinks=True)
    path = copied / "checkpoints" / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"value":5.0', b'"value":5.5'))
    with pytest.raises(ValueError, match="damaged"):
        Run(copied)
    with pytest.raises(LedgerError, match="checksum does not match"):
        read_history(copied)


def test_independent_reader_refuses_a_hole_before_a_commit(directory, tmp_path):
    copied = shutil.copytree(directory, tmp_path / "run", symlinks=True)
    path = copied / "checkpoints" / "ledger.jsonl"
    first, second, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([first, b"\0" * len(second), *rest]))
    with pytest.raises(ValueError, match="damaged"):
        Run(copied)
    with pytest.raises(LedgerError, match="damaged"):
        read_history(copied)

"""What file managers and NFS leave among the snapshots is nobody's damage, and nobody's snapshot."""

from __future__ import annotations

import pytest
from torch import nn

from keepbest import load
from keepbest.remote.upload import upload
from keepbest.remote.verify import verify_run
from keepbest.run.maintenance import repair
from keepbest.run.verify import verify
from tests.kit.runs import Run, refs, saved_at

BEST = "best_model.loss"
STRAY = [".DS_Store", "._model.pt", ".nfs0000000004a3c2d100000001", ".fuse_hidden0000000a00000002"]


def leave_in(*folders):
    for folder in folders:
        for name in STRAY:
            (folder / name).write_bytes(b"of nobody")


def places(run):
    snapshots = run / "checkpoints" / "snapshots"
    return [run, run / "checkpoints", snapshots, snapshots / "U1"]


@pytest.mark.parametrize("kind", ["torch", "safetensors", "dcp"])
def test_stray_files_stop_no_reader_and_no_resume(kind, tmp_path):
    run = tmp_path / "run"
    with Run(run, format=kind).keeper as keeper:
        keeper.observe(2.0, update=1)
    leave_in(*places(run))
    assert verify(run) == []
    assert load(run, BEST, nn.Linear(1, 1)).iteration.update == 1
    repair(run)
    assert verify(run) == []
    with Run(run, format=kind, resume="ledger").keeper as keeper:
        keeper.observe(1.0, update=2)
    assert (verify(run), refs(run)) == ([], {BEST: "U2.r1"})
    snapshots = run / "checkpoints" / "snapshots"
    assert sorted(path.name for path in snapshots.iterdir()) == sorted([*STRAY, "U2.r1"])


def test_stray_files_alone_are_no_run(tmp_path):
    snapshots = tmp_path / "checkpoints" / "snapshots"
    snapshots.mkdir(parents=True)
    leave_in(tmp_path, tmp_path / "checkpoints", snapshots)
    run = Run(tmp_path)
    with run.keeper:
        run.observe(1.0)
    assert (verify(tmp_path), saved_at(tmp_path, BEST)) == ([], 1)


def test_stray_files_are_not_uploaded(tmp_path):
    run, copy = tmp_path / "run", tmp_path / "copy"
    with Run(run).keeper as keeper:
        keeper.observe(2.0, update=1)
    leave_in(*places(run))
    upload(run, f"file://{copy}")
    assert [path for path in copy.rglob("*") if path.name in STRAY] == []
    leave_in(*places(copy)[2:])
    assert verify_run(f"file://{copy}") == []


def make_link(path):
    path.symlink_to("/etc/hostname")


def make_folder(path):
    path.mkdir()
    (path / "inside").touch()


def make_file(path):
    path.touch()


LOOK_ALIKES = [
    *((make, name) for make in (make_link, make_folder) for name in STRAY),
    *((make_file, name) for name in ("DS_Store", "_model.pt", ".nfs", ".nfs0z", ".hidden", "more.pt")),
]


@pytest.mark.parametrize(("make", "name"), LOOK_ALIKES)
def test_what_only_looks_like_a_stray_file_is_damage(make, name, tmp_path):
    with Run(tmp_path).keeper as keeper:
        keeper.observe(2.0, update=1)
    make(tmp_path / "checkpoints" / "snapshots" / "U1" / name)
    assert ["was put there by somebody else" in fault.message for fault in verify(tmp_path)] == [True]

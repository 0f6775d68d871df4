"""Run folders that somebody damaged or forged, and names that try to climb out: refused with the reason, or handled.

A refused load leaves every byte of the model, a refused start every entry of the folder.
"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from keepbest import BestKeeper, TrainingIteration, load
from keepbest.errors import ConfigError, KeepBestError
from keepbest.run.maintenance import repair
from keepbest.run.verify import verify
from tests.faults.hostile_run import (
    BEST,
    Evil,
    bits,
    checkpoints,
    damage,
    flipped,
    forge,
    forge_manifest,
    holds,
    make_run,
    net,
    refused_load,
    refused_start,
    settings,
    snapshot,
    tree,
)
from tests.kit.pool import run_ranks


@pytest.fixture
def run(tmp_path) -> Path:
    make_run(tmp_path / "run")
    return tmp_path / "run"


# --- damaged files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.pt", "snapshot.json"])
def test_changed_or_missing_byte_of_a_snapshot_is_noticed(run, name, request):
    path = snapshot(run) / name
    data = path.read_bytes()
    places = 15 if request.config.getoption("--quick") else 60
    for at in [*range(0, len(data), 1 + len(data) // places), len(data) - 1]:
        for changed in (flipped(data, at), data[:at], data[:at] + data[at + 1 :], data[:at] + b"\0" + data[at:]):
            if changed != data:
                path.write_bytes(changed)
                assert "damaged" in refused_load(run)
    assert len(damage(run)) == 1
    path.unlink()
    assert "cannot be read" in refused_load(run)
    path.write_bytes(data)
    assert holds(run) == {4.0}


# --- forged files -----------------------------------------------------------------------------------------------------


def save_bare_pickle(state, path: Path) -> None:
    path.write_bytes(pickle.dumps(state))


@pytest.mark.parametrize("save", [torch.save, save_bare_pickle])
@pytest.mark.parametrize("place", ["instead", "as a value", "as a key"])
def test_pickle_that_would_run_code_is_refused_and_not_run(run, tmp_path, save, place):
    mark = tmp_path / "it ran"
    evil = Evil(mark)
    state = {"instead": evil, "as a value": {**net(0.0).state_dict(), "0.bias": evil}, "as a key": {evil: 1}}[place]
    forge(run, state, save=save)
    assert damage(run) == []  # the forgery is consistent: weights_only alone stands in its way
    reason = refused_load(run)
    assert "SnapshotError" in reason
    assert "cannot be read as weights" in reason
    assert not mark.exists()
    pickle.loads(pickle.dumps(evil))
    assert mark.exists()  # it would have done it


def strange_states() -> dict[str, object]:
    good = net(9.0).state_dict()
    bias = good["1.bias"]
    return {
        "a list": [1, 2],
        "a number": 5,
        "nothing": {},
        "one key less": {key: value for key, value in good.items() if key != "1.bias"},
        "one key more": {**good, "2.bias": bias},
        "another shape": {**good, "1.bias": torch.zeros(3)},
        "no tensor": {**good, "1.bias": [0.0, 0.0]},
        "a key that is no string": {**good, 7: bias},
        "sparse": {**good, "1.bias": bias.to_sparse()},
        "meta": {**good, "1.bias": bias.to("meta")},
        "complex": {**good, "1.bias": bias.to(torch.complex64)},
    }


@pytest.mark.parametrize("kind", strange_states())
def test_forged_weights_that_do_not_fit_are_refused_as_a_whole(run, kind):
    forge(run, strange_states()[kind])
    reason = refused_load(run)
    assert "SnapshotError" in reason


def load_on_two_ranks(run: Path) -> tuple[str, bool]:
    model = net(-1.0)
    try:
        load(run, BEST, model, rank_timeout=20.0, save_timeout=20.0)
    except KeepBestError as error:
        return str(error), bits(model) == bits(net(-1.0))
    return "", False


@pytest.mark.parametrize("kind", ["sparse", "one key less", "a list"])
def test_forged_weights_are_refused_on_every_rank(run, kind):
    forge(run, strange_states()[kind])
    (reason, untouched), (reason_of_1, untouched_of_1) = run_ranks(load_on_two_ranks, 2, run)
    assert reason == reason_of_1 != ""
    assert untouched
    assert untouched_of_1


MANIFESTS = {
    "no object": lambda manifest: [manifest],
    "no files": lambda manifest: {key: value for key, value in manifest.items() if key != "files"},
    "files are a list": lambda manifest: {**manifest, "files": ["model.pt"]},
    "a file without a digest": lambda manifest: {**manifest, "files": {"model.pt": {"part": "model", "bytes": 5}}},
    "a file of another digest": lambda manifest: {
        **manifest, "files": {"model.pt": {**manifest["files"]["model.pt"], "algorithm": "crc-1"}},
    },
    "a file outside": lambda manifest: {**manifest, "files": {"../../../secret.pt": manifest["files"]["model.pt"]}},
    "an absolute file": lambda manifest: {**manifest, "files": {"/etc/passwd": manifest["files"]["model.pt"]}},
    "the folder itself": lambda manifest: {**manifest, "files": {".": manifest["files"]["model.pt"]}},
    "an iteration of nothing": lambda manifest: {**manifest, "iteration": "../x"},
    "parts of nothing": lambda manifest: {**manifest, "parts": 3},
    "versions of another part": lambda manifest: {**manifest, "versions": {"head": {}}},
    "versions that are a list": lambda manifest: {**manifest, "versions": {"model": [2]}},
    "a version that is no version": lambda manifest: {**manifest, "versions": {"model": {"": [2]}}},
    "no left_out": lambda manifest: {**manifest, "left_out": None},
}  # fmt: skip


@pytest.mark.parametrize("kind", MANIFESTS)
def test_forged_manifest_is_refused_by_load_and_told_by_verify(run, kind):
    shutil.copy(snapshot(run) / "model.pt", run.parent / "secret.pt")
    forge_manifest(run, MANIFESTS[kind](json.loads((snapshot(run) / "snapshot.json").read_text())))
    assert "SnapshotError" in refused_load(run)
    assert len(damage(run)) == 1


# --- links ------------------------------------------------------------------------------------------------------------


def test_ref_that_points_outside_does_not_lead_a_load_there(run, tmp_path):
    make_run(tmp_path / "other", values=[1.0])
    ref = checkpoints(run) / BEST
    ref.unlink()
    ref.symlink_to(tmp_path / "other/checkpoints/snapshots/E1")
    assert holds(run) == {4.0}
    assert any(BEST in fault.message and "points at" in fault.message for fault in verify(run))
    repair(run)
    assert verify(run) == []
    assert (tmp_path / "other/checkpoints/snapshots/E1/model.pt").exists()


def test_link_among_the_snapshots_is_removed_not_its_target(run, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.txt").write_text("mine")
    (checkpoints(run) / "snapshots/E9").symlink_to(tmp_path / "precious")
    (checkpoints(run) / "snapshots/.tmp-E9").symlink_to(tmp_path / "precious")
    (checkpoints(run) / ".tmp-x").symlink_to(tmp_path / "precious")
    repair(run)
    assert verify(run) == []
    assert (tmp_path / "precious/thesis.txt").read_text() == "mine"


# --- names ------------------------------------------------------------------------------------------------------------

NAMES = [
    "../../x", "a/b", "a.b", "a%2Eb", ".", "..", "/", "/etc", "x" * 300, "x" * 299 + "y", "\0", "a\nb", "größe/µ",
    "日本", "\udcff", "tolerance=0", "id=x", "~", "con", "-rf", "a b", "\u202e",
]  # fmt: skip
CASES = [*((name, None) for name in NAMES), *(("loss", name) for name in NAMES), *((name, name) for name in NAMES)]


def test_any_key_and_id_stay_in_the_folder_and_apart(tmp_path, request):
    run = tmp_path / "runs/run"
    cases = CASES[:: 5 if request.config.getoption("--quick") else 1]
    with_names = [
        BestKeeper(net(float(number)), directory=run, **settings(metric_key=key, id=keeper_id))
        for number, (key, keeper_id) in enumerate(cases, start=1)
    ]
    for keeper in with_names:
        keeper.observe(1.0, TrainingIteration(epoch=1))
        keeper.observe(2.0, TrainingIteration(epoch=2))
    for keeper in with_names:
        keeper.close()
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"run"}
    assert {path.name for path in run.iterdir()} == {"checkpoints"}
    assert verify(run) == []
    for number, keeper in enumerate(with_names, start=1):
        for ref in (keeper.name, f"{keeper.name}.tolerance=0"):
            assert holds(run, ref) == {float(number)}, keeper.name
            assert (checkpoints(run) / ref).readlink().parts[0] == "snapshots"


def test_case_twins_are_refused_and_do_not_harm_the_first(tmp_path):
    run = tmp_path / "run"
    with BestKeeper(net(1.0), directory=run, **settings(metric_key="loss")) as keeper:
        before = tree(tmp_path)
        for twin, reason in (("LOSS", "upper and lower case"), ("loss", "two keepers")):
            with (
                pytest.raises(ConfigError, match=reason),
                BestKeeper(net(2.0), directory=run, **settings(metric_key=twin)),
            ):
                pass
        assert tree(tmp_path) == before
        assert keeper.observe(1.0, TrainingIteration(epoch=1)).is_new_best
    assert holds(run) == {1.0}


def test_refused_new_run_leaves_the_folder_to_be_resumed(run):
    assert "RunExistsError" in refused_start(run, resume=None)
    with BestKeeper(net(0.0), directory=run, resume="ledger", **settings()) as keeper:
        assert keeper.best_metric_value == 1.0

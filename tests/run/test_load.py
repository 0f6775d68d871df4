"""Loading: all of the right snapshot, or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import pickle

import pytest
import torch
import xxhash
from torch import nn

from keepbest import load
from keepbest.errors import SnapshotError
from tests.kit.ledger_lines import read_lines, write_lines
from tests.kit.pool import run_ranks
from tests.kit.runs import Run, set_weights, update

BEST = "best_model.loss"


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path, nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)), model_names=["0", "1"])
    with run.keeper:
        run.observe(2.0, 1.0)
    set_weights(run.model, 9)
    return run


def assert_refused(run, message):
    with pytest.raises(SnapshotError, match=message):
        load(run.keeper.directory, BEST, run.model)
    assert all((parameter == 9).all() for parameter in run.model.parameters())


def test_load_tells_what_it_brought(run):
    loaded = load(run.keeper.directory, BEST, run.model)
    assert (loaded.iteration, loaded.metric_key, loaded.value, loaded.parts) == (update(2), "loss", 1.0, ("0", "1"))
    assert loaded.path == run.keeper.best_path
    assert all((parameter == 2).all() for parameter in run.model.parameters())


@pytest.mark.parametrize("name", ["0.pt", "1.pt", "snapshot.json"])
def test_flipped_byte_is_found_in_any_file(run, name):
    path = run.keeper.best_path / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert_refused(run, f"{name} is damaged")


@pytest.mark.parametrize("change", ["truncate", "remove", "empty", "append"])
def test_file_of_another_length_is_refused_before_the_load(run, change):
    path = run.keeper.best_path / "1.pt"
    data = path.read_bytes()
    path.write_bytes({"truncate": data[:-1], "append": data + b"\0"}.get(change, b""))
    if change == "remove":
        path.unlink()
    assert_refused(run, "1.pt")


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_pickle_that_runs_code_is_refused_despite_its_digest(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = run.keeper.best_path / "0.pt"
    torch.save({"weight": Trap()}, path)
    _sign(run, path)
    assert_refused(run, "0.pt cannot be read as weights")
    path.write_bytes(pickle.dumps(Trap()))
    _sign(run, path)
    assert_refused(run, "0.pt cannot be read as weights")
    assert not (tmp_path / "sprung").exists()


def _sign(run, path):
    """What an attacker would do who may write to the folder: make manifest and ledger agree with the file."""
    manifest_path = run.keeper.best_path / "snapshot.json"
    before = hashlib.blake2b(manifest_path.read_bytes(), digest_size=16).hexdigest()
    manifest = json.loads(manifest_path.read_text())
    manifest["files"][path.name] |= {
        "bytes": path.stat().st_size,
        "digest": xxhash.xxh3_128(path.read_bytes()).hexdigest(),
    }
    manifest_path.write_text(json.dumps(manifest))
    after = hashlib.blake2b(manifest_path.read_bytes(), digest_size=16).hexdigest()
    ledger = run.keeper.directory / "checkpoints" / "ledger.jsonl"
    assert before in ledger.read_text()
    ledger.write_text(ledger.read_text().replace(before, after))
    write_lines(run.keeper.directory, read_lines(run.keeper.directory))


def test_unknown_ref_lists_those_that_exist(run, tmp_path):
    with pytest.raises(SnapshotError, match=r"has no ref 'best'; there are: best_model.loss"):
        load(run.keeper.directory, "best", run.model)
    with pytest.raises(SnapshotError, match="there is nothing"):
        load(tmp_path / "nowhere", BEST, run.model)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(3, 2), nn.Linear(4, 1)), "submodel '1', shapes differ for weight"),
        (nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1, bias=False)), "submodel '1', the model lacks bias"),
        (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), "lacks num_batches_tracked, running_mean, running_var"),
        (nn.Sequential(nn.Linear(3, 2)), "there is no submodel '1' in it"),
    ],
    ids=["shape", "key too many", "key too few", "part"],
)
def test_snapshot_of_another_model_is_refused(run, model, message):
    set_weights(model, 9)
    run.model = model
    assert_refused(run, message)


def load_what_is_damaged(directory):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    set_weights(model, 9)
    with pytest.raises(SnapshotError) as caught:
        load(directory, BEST, model)
    return str(caught.value), all((parameter == 9).all() for parameter in model.parameters())


def test_every_rank_is_told_of_the_damage_that_rank_0_found(run):
    (run.keeper.best_path / "1.pt").unlink()
    outcomes = run_ranks(load_what_is_damaged, 3, run.keeper.directory)
    assert outcomes == [outcomes[0]] * 3
    assert "rank 0 of 3" in outcomes[0][0]
    assert outcomes[0][1]

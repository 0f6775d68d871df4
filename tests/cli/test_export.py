from __future__ import annotations

import pytest
import safetensors.torch
import torch

from tests.kit import cli_runs as runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    callbacks = [runs.evaluation(), runs.best(format="dcp"), runs.best(id="gathered")]
    content = runs.describe_run(folder / "run", epochs=2, strategy="fsdp2", callbacks=callbacks)
    runs.succeeded(runs.train_on_ranks(2, runs.write_config(folder / "config.yaml", content)))
    return folder / "run"


def test_show_verify_and_eval_know_what_all_ranks_wrote(run):
    table = runs.keepbest("show", run).stdout
    assert "encoder.dcp (3 files), decoder.dcp (3" in table
    assert runs.keepbest("verify", run).exit_code == 0
    evaluated = [runs.keepbest("eval", run, "--ref", ref).stdout for ref in (runs.BEST, f"{runs.BEST}.id=gathered")]
    assert evaluated[0].splitlines()[2:] == evaluated[1].splitlines()[2:] != []


def test_export_of_dcp_equals_the_gathered_snapshot(run, tmp_path):
    gathered = runs.weights(run, f"{runs.BEST}.id=gathered")
    for to in ("best.pt", "best.safetensors", "best"):
        exported = runs.keepbest("export", run, runs.BEST, "--to", tmp_path / to)
        assert (exported.exit_code, exported.stderr) == (0, "")
        [line] = exported.stdout.splitlines()
        path = tmp_path / to / "model.safetensors" if to == "best" else tmp_path / to
        assert line == f"{path}: {path.stat().st_size:,} bytes"
        state = torch.load(path, weights_only=True) if path.suffix == ".pt" else safetensors.torch.load_file(path)
        assert state.keys() == gathered.keys() != set()
        assert all(torch.equal(state[key], gathered[key]) for key in gathered)
    again = runs.keepbest("export", run, runs.BEST, "--to", tmp_path / "best.pt")
    assert (again.exit_code, again.stderr) == (1, f"error: {tmp_path / 'best.pt'} exists; nothing is overwritten\n")

"""Training states from somebody else: nothing in them runs or grows, and what makes no sense is an error of ours."""

from __future__ import annotations

import io
import pickle
import shutil

import pytest
import torch

from keepbest import load
from keepbest.errors import KeepBestError
from tests.faults.hostile_run import Evil, record
from tests.kit.strategies import single
from tests.training_state.loop import BEST, Training
from tests.training_state.test_continue import OPTIMIZERS
from tests.training_state.test_saving import Counter

OTHERS = {"counter": lambda _: Counter()}


def packed(value) -> bytes:
    torch.save(value, data := io.BytesIO())
    return data.getvalue()


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    for kind in ("torch", "dcp"):
        Training(single, OPTIMIZERS["adamw"], others=OTHERS).keep(folder / kind, format=kind)
    return folder


def refused(run):
    """The reason why nothing was loaded."""
    record(run)
    training = Training(single, OPTIMIZERS["adamw"], seed=2, others=OTHERS)
    before = training.everything()
    with pytest.raises(KeepBestError) as caught:
        load(run, BEST, training.model, training_state=training.state)
    assert training.everything() == before
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "torch/*/optimizer.pt", "torch/*/counter.pt", "dcp/*/optimizer.pt", "dcp/*/optimizer.dcp/.metadata",
        "dcp/*/optimizer.dcp/__0_0.distcp",
    ],
)  # fmt: skip
@pytest.mark.parametrize("pack", [pickle.dumps, packed])
def test_payload_in_a_training_state_is_not_run(name, pack, kept, tmp_path):
    kind, _, file = name.partition("/*/")
    run = shutil.copytree(kept / kind, tmp_path / "run", symlinks=True)
    for path in run.glob(f"checkpoints/snapshots/*/{file}"):
        path.write_bytes(pack(Evil(tmp_path / "it ran")))
    refused(run)
    assert not (tmp_path / "it ran").exists()


GROUPS = "param_groups.00"
FEW = {"params": [], "lr": 0.1}


@pytest.mark.parametrize(
    "content",
    [
        {},
        {GROUPS: 1},
        {GROUPS: {"param_groups": [1], "state": {}, "other": {}}},
        {GROUPS: {"param_groups": [FEW]}},
        {GROUPS: {"param_groups": [{"params": [["x"]]}], "state": {}, "other": {}}},
        {GROUPS: {"param_groups": [{"params": ["module.weight"]}], "state": {"module.weight": 3}, "other": {}}},
        {GROUPS: {"param_groups": [FEW], "state": {}, "other": {}}, 3: torch.ones(1)},
        {"module.weight/exp_avg": torch.ones(1)},
        [1],
    ],
    ids=str,
)
def test_training_state_that_makes_no_sense_is_refused(content, kept, tmp_path):
    run = shutil.copytree(kept / "torch", tmp_path / "run", symlinks=True)
    for path in run.glob("checkpoints/snapshots/*/optimizer.pt"):
        path.write_bytes(packed(content))
    refused(run)


def test_tensor_inside_the_data_that_would_grow_is_refused(kept, tmp_path):
    run = shutil.copytree(kept / "torch", tmp_path / "run", symlinks=True)
    for path in run.glob("checkpoints/snapshots/*/counter.pt"):
        path.write_bytes(packed({"state": {"value": [torch.ones(1).expand(1 << 40)]}}))
    assert "['state']['value'][0] would grow to" in refused(run)

"""What an older class saved reaches the present one with the version of then, as in torch's own state dicts."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from torch import nn

from keepbest import BestKeeper, TrainingIteration, average, load
from keepbest.errors import SnapshotError
from keepbest.export import export
from tests.kit.ledger_lines import read_lines, write_lines
from tests.kit.models import filled, same_bits
from tests.kit.pool import run_ranks
from tests.kit.strategies import WRAPS, compiled, replace_blocks, whole_weights

REF = "best_model.loss"
WAYS = {**WRAPS, "compiled_blocks": lambda model: compiled(replace_blocks(model, compiled))}
FORMATS = ["torch", "safetensors", "dcp"]


class Old(nn.Linear):
    """Has no version of its own."""


class New(nn.Linear):
    """Notes which version the weights that it is given are of."""

    _version = 2
    found: object = None

    def _load_from_state_dict(self, state, prefix, metadata, *others):
        self.found = metadata.get("version")
        super()._load_from_state_dict(state, prefix, metadata, *others)


class Newest(New):
    _version = 3


class Around(nn.Module):
    """Has no weights of its own, as models whose newer class converts those of their blocks."""

    _version = 5

    def __init__(self, block):
        super().__init__()
        self.module, self.tied = block, nn.Linear(2, 2)
        self.found = None

    def _load_from_state_dict(self, state, prefix, metadata, *others):
        self.found = metadata.get("version")
        super()._load_from_state_dict(state, prefix, metadata, *others)

    def forward(self, x):
        return self.tied(self.module(x))


class AroundNow(Around):
    _version = 6


def keep(directory, model, file_format="torch", **settings):
    with BestKeeper(model, directory=directory, metric_key="loss", format=file_format, **settings) as keeper:
        keeper.observe(1.0, TrainingIteration(update=1))


def found_in(model):
    return [module.found for module in model.modules() if isinstance(module, Around | New)]


def versions_after_load(directory, file_format, wrap):
    saved = WAYS[wrap](filled(Around(New(2, 2)), 0))
    keep(directory, saved, file_format)
    target = WAYS[wrap](filled(AroundNow(Newest(2, 2)), 1))
    load(directory, REF, target)
    return found_in(target), all(map(same_bits, whole_weights(target), whole_weights(saved)))


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize(
    ("wrap", "world_size"),
    [("single", 1), ("ddp", 2), ("fsdp1", 2), ("fsdp1_flat_nested", 2), ("fsdp2_nested", 2), ("compiled_blocks", 1)],
)
def test_modules_get_the_versions_that_were_saved(file_format, wrap, world_size, tmp_path):
    expected = ([5, 2], True)
    assert run_ranks(versions_after_load, world_size, tmp_path, file_format, wrap) == [expected] * world_size


@pytest.mark.parametrize("file_format", FORMATS)
def test_class_without_a_version_is_of_version_one(file_format, tmp_path):
    keep(tmp_path, nn.Sequential(Old(2, 2)), file_format)
    load(tmp_path, REF, target := nn.Sequential(New(2, 2)))
    assert found_in(target) == [1]


def test_part_and_selection_have_the_versions_of_their_modules(tmp_path):
    keep(tmp_path, nn.Sequential(New(2, 2), Newest(2, 2), Newest(2, 2)), model_names=["0", "1"])
    load(tmp_path, REF, target := nn.Sequential(Newest(2, 2), New(2, 2), New(2, 2)), only="0.weight")
    assert found_in(target) == [2, None, None]
    load(tmp_path, REF, target)
    assert found_in(target) == [2, 3, None]


def test_module_without_what_is_selected_is_not_migrated(tmp_path):
    keep(tmp_path, nn.Sequential(Old(2, 2), Old(2, 2)))
    load(tmp_path, REF, target := nn.Sequential(New(2, 2), New(2, 2)), only="0")
    assert found_in(target) == [1, 2]


def load_stage(directory):
    rank = torch.distributed.get_rank()
    stages = {1: New(2, 2), 0: Newest(2, 2)}
    keep(directory, nn.ModuleDict({f"stage{rank}": stages[rank]}))
    load(directory, REF, target := nn.ModuleDict({"stage0": New(2, 2), "stage1": New(2, 2)}))
    return found_in(target)


def test_versions_of_all_ranks_are_recorded(tmp_path):
    assert run_ranks(load_stage, 2, tmp_path) == [[3, 2]] * 2


def test_module_that_is_exchanged_later_has_its_own_version(tmp_path):
    model = nn.Sequential(New(2, 2))
    with BestKeeper(model, directory=tmp_path, metric_key="loss") as keeper:
        keeper.observe(2.0, TrainingIteration(update=1))
        weights = model[0].weight, model[0].bias
        model[0] = Newest(2, 2)
        model[0].weight, model[0].bias = weights
        keeper.observe(1.0, TrainingIteration(update=2))
    load(tmp_path, REF, target := nn.Sequential(New(2, 2)))
    assert found_in(target) == [3]


def forget_versions(directory):
    """Leave a snapshot as it was written before versions were recorded."""
    [path] = directory.glob("checkpoints/snapshots/*/snapshot.json")
    before = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    content = json.loads(path.read_bytes())
    del content["versions"]
    path.write_text(json.dumps(content))
    after = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    lines = read_lines(directory)
    assert before in {line.get("manifest") for line in lines}
    write_lines(directory, [line | {"manifest": after} if line.get("manifest") == before else line for line in lines])


@pytest.mark.parametrize("file_format", FORMATS)
def test_snapshot_without_versions_is_taken_for_one_of_now(file_format, tmp_path):
    keep(tmp_path / "run", nn.Sequential(Old(2, 2), Newest(2, 2)), file_format)
    forget_versions(tmp_path / "run")
    load(tmp_path / "run", REF, target := nn.Sequential(New(2, 2), New(2, 2)))
    assert found_in(target) == [2, 2]
    [path] = export(tmp_path / "run", REF, tmp_path / "out.pt")
    assert not hasattr(torch.load(path, weights_only=True), "_metadata")


def test_manifest_names_only_versions_other_than_one(tmp_path):
    keep(tmp_path, nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), New(2, 2)))
    [path] = tmp_path.glob("checkpoints/snapshots/*/snapshot.json")
    assert json.loads(path.read_bytes())["versions"] == {"model": {"1": 2, "2": 2}}


@pytest.mark.parametrize("source", ["export", "snapshot"])
def test_file_carries_the_versions_as_a_file_of_torch(source, tmp_path):
    model = nn.Sequential(New(2, 2), nn.Linear(2, 2))
    keep(tmp_path / "run", model)
    if source == "export":
        [path] = export(tmp_path / "run", REF, tmp_path / "out.pt")
    else:
        [path] = tmp_path.glob("run/checkpoints/snapshots/*/model.pt")
    torch.save(model.state_dict(), tmp_path / "own.pt")
    of_torch, state = (torch.load(each, weights_only=True) for each in (tmp_path / "own.pt", path))
    assert state._metadata == of_torch._metadata
    target = nn.Sequential(Newest(2, 2), nn.Linear(2, 2))
    target.load_state_dict(state)
    assert found_in(target) == [2]


def test_average_of_two_versions_is_refused(tmp_path):
    model = nn.Sequential(New(2, 2))
    with BestKeeper(model, directory=tmp_path / "run", metric_key="loss", keep_top_k=2) as keeper:
        keeper.observe(2.0, TrainingIteration(update=1))
        model[0] = Newest(2, 2)
        keeper.observe(1.0, TrainingIteration(update=2))
    with pytest.raises(SnapshotError, match="the class of 0 has another version"):
        average(tmp_path / "run", tmp_path / "average.pt", top=2)

"""Loading a part, into models that have grown, and into models that hold a part each."""

from __future__ import annotations

import logging
from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from keepbest import BestKeeper, TrainingIteration, load
from keepbest.errors import ConfigError, SnapshotError
from keepbest.export import export
from tests.kit.models import Bare, filled, same_bits
from tests.kit.pool import run_ranks
from tests.kit.runs import set_weights
from tests.kit.strategies import WRAPS, whole_weights

REF = "best_model.loss"
FORMATS = ["torch", "safetensors", "dcp"]
EVERY_FORMAT = pytest.mark.parametrize("file_format", FORMATS)


class Net(nn.Module):
    def __init__(self, head=2):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        self.head = nn.Linear(3, head)


def keep(model, directory, file_format="torch", number=7.0):
    set_weights(model, number)
    with BestKeeper(model, directory=directory, metric_key="loss", format=file_format) as keeper:
        keeper.observe(1.0, TrainingIteration(update=1))


def values(module):
    return {value for parameter in module.parameters() for value in parameter.flatten().tolist()}


@EVERY_FORMAT
@pytest.mark.parametrize("only", ["encoder", ["encoder.0", "encoder.1"]])
def test_only_a_part_is_loaded_and_the_rest_is_listed(file_format, only, tmp_path):
    keep(Net(), tmp_path, file_format)
    set_weights(model := Net(head=5), 1.0)
    loaded = load(tmp_path, REF, model, only=only)
    assert (values(model.encoder), values(model.head)) == ({7.0}, {1.0})
    assert loaded.keys == ("encoder.0.bias", "encoder.0.weight", "encoder.1.bias", "encoder.1.weight")
    assert loaded.left_alone == loaded.unused == ("head.bias", "head.weight")


def test_only_a_submodel_of_a_composite_is_loaded(tmp_path):
    keep(Bare({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 1)}), tmp_path)
    set_weights(model := Bare({"encoder": nn.Linear(2, 2), "other": nn.Linear(2, 1)}), 1.0)
    loaded = load(tmp_path, REF, model, only="encoder")
    assert (values(model.encoder), values(model.other)) == ({7.0}, {1.0})
    assert loaded.parts == ("encoder",)
    assert loaded.left_alone == ("other.bias", "other.weight")
    assert loaded.unused == ("head",)


@EVERY_FORMAT
def test_rest_stays_strict(file_format, tmp_path):
    keep(Net(), tmp_path, file_format)
    set_weights(model := Net(head=5), 1.0)
    model.encoder.append(nn.Linear(3, 3))
    with pytest.raises(SnapshotError, match=r"the snapshot lacks encoder\.2\.bias, encoder\.2\.weight. Nothing"):
        load(tmp_path, REF, model, only="encoder")
    with pytest.raises(SnapshotError, match=r"the model lacks encoder\.1\.bias, encoder\.1\.weight\. Nothing"):
        load(tmp_path, REF, nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(3, 3))}), only=["encoder"])
    with pytest.raises(ConfigError, match=r"nothing at 'encodr'; there are: encoder, head, encoder\.0, encoder\.1"):
        load(tmp_path, REF, model, only=["encoder", "encodr"])
    with pytest.raises(ConfigError, match="only must be a dotted path"):
        load(tmp_path, REF, model, only=[])
    assert values(model.head) == {1.0}


class Scaled(nn.Linear):
    """As the layers of TransformerEngine: what it keeps beside its weights comes and goes with its version."""

    def get_extra_state(self):
        return {"amax": [self.amax]}

    def set_extra_state(self, state):
        self.amax = state["amax"][0]

    amax = 1.0


def test_extra_state_outside_of_what_was_saved_is_listed(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), Scaled(2, 2))
    with BestKeeper(model, directory=tmp_path, metric_key="loss", model_names=["0"]) as keeper:
        keeper.observe(1.0, TrainingIteration(update=1))
    assert load(tmp_path, REF, model).left_alone == ("1._extra_state", "1.bias", "1.weight")


@pytest.mark.parametrize("file_format", ["torch", "dcp"])
@pytest.mark.parametrize("saved", [Scaled, nn.Linear])
@pytest.mark.parametrize("loaded_into", [Scaled, nn.Linear])
def test_extra_state_may_come_and_go_and_is_listed(saved, loaded_into, file_format, tmp_path):
    model = nn.Sequential(saved(2, 2))
    model[0].amax = 5.0
    keep(model, tmp_path, file_format)
    loaded = load(tmp_path, REF, target := nn.Sequential(loaded_into(2, 2)))
    assert values(target) == {7.0}
    extra = ("0._extra_state",)
    assert loaded.left_alone == (extra if (saved, loaded_into) == (nn.Linear, Scaled) else ())
    assert loaded.unused == (extra if (saved, loaded_into) == (Scaled, nn.Linear) else ())
    assert getattr(target[0], "amax", None) == (None if loaded_into is nn.Linear else 5.0 if saved is Scaled else 1.0)


def layers(numbers, seed=0):
    """Layers of a model of several; each has its weights wherever it is."""
    return nn.Sequential(
        OrderedDict((str(number), filled(nn.Linear(4, 3 + number), seed + number)) for number in numbers)
    )


def load_into_stages(directory, file_format, wrap):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine = range(rank * 4 // world_size, (rank + 1) * 4 // world_size)
    model = layers(mine, seed=10)
    if wrap == "fsdp2":  # each stage over a group of its own
        groups = [dist.new_group([each]) for each in range(world_size)]
        fully_shard(model, mesh=DeviceMesh.from_group(groups[rank], "cpu"))
    loaded = load(directory, REF, model)
    whole = layers(range(4))
    saved = [whole[number] for number in mine]
    expected = [tensor for layer in saved for tensor in layer.parameters()]
    found = whole_weights(model)
    return (
        all(map(same_bits, found, expected))
        and loaded.left_alone == ()
        and len(loaded.keys) == 2 * len(mine) == 8 - len(loaded.unused)
    )


@EVERY_FORMAT
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("wrap", ["plain", "fsdp2"])
def test_whole_model_loads_into_the_stages_of_a_pipeline(file_format, wrap, world_size, tmp_path):
    with BestKeeper(layers(range(4)), directory=tmp_path, metric_key="loss", format=file_format) as keeper:
        keeper.observe(1.0, TrainingIteration(update=1))
    assert run_ranks(load_into_stages, world_size, tmp_path, file_format, wrap) == [True] * world_size


def load_into_too_few_stages(directory):
    model = layers([dist.get_rank()], seed=10)
    before = whole_weights(model)
    with pytest.raises(SnapshotError) as caught:
        load(directory, REF, model)
    return str(caught.value), all(map(same_bits, whole_weights(model), before))


@EVERY_FORMAT
def test_weights_that_no_stage_has_are_refused_on_every_rank(file_format, tmp_path):
    with BestKeeper(layers(range(3)), directory=tmp_path, metric_key="loss", format=file_format) as keeper:
        keeper.observe(1.0, TrainingIteration(update=1))
    outcomes = run_ranks(load_into_too_few_stages, 2, tmp_path)
    assert outcomes == [outcomes[0]] * 2
    assert "does not fit the model: the model lacks 2.bias, 2.weight. Nothing was loaded" in outcomes[0][0]
    assert outcomes[0][1]


def load_part_when_sharded(directory, file_format, wrap):
    model = WRAPS[wrap](filled(Net(head=5), 1))
    before = whole_weights(model)
    logged = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    logger = logging.getLogger("torch.distributed.fsdp._state_dict_utils")
    logger.addHandler(handler)
    loaded = load(directory, REF, model, only="encoder")
    assert not logged
    after = whole_weights(model)
    changed = [not same_bits(old, new) for old, new in zip(before, after, strict=True)]
    return changed, loaded.left_alone


@EVERY_FORMAT
@pytest.mark.parametrize("wrap", ["ddp", "fsdp1", "fsdp1_flat", "fsdp2"])
def test_only_a_part_of_a_sharded_model_is_loaded(file_format, wrap, tmp_path):
    keep(Net(), tmp_path, file_format)
    outcomes = run_ranks(load_part_when_sharded, 2, tmp_path, file_format, wrap)
    assert outcomes == [([True] * 4 + [False] * 2, ("head.bias", "head.weight"))] * 2


@EVERY_FORMAT
@pytest.mark.parametrize("to", ["out.pt", "out.safetensors"])
def test_only_a_part_is_exported(file_format, to, tmp_path):
    keep(Net(), tmp_path / "run", file_format)
    export(tmp_path / "run", REF, tmp_path / to, only="encoder.1")
    if to.endswith(".pt"):
        found = torch.load(tmp_path / to, weights_only=True)
    else:
        found = load_file(tmp_path / to)
    assert sorted(found) == ["encoder.1.bias", "encoder.1.weight"]
    with pytest.raises(ConfigError, match="nothing at 'decoder'"):
        export(tmp_path / "run", REF, tmp_path / "none.pt", only=["decoder"])

"""Ranks that hold other names, as the stages of a pipeline do, are one model: every format keeps all of it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from keepbest import BestKeeper, load
from keepbest.capture.catalogue import Entry, Form, Name
from keepbest.capture.union import Report, unite
from tests.capture.test_strategies import read_files
from tests.kit.models import same_bits
from tests.kit.pool import run_ranks
from tests.kit.runs import set_weights, update
from tests.kit.strategies import CPU

FORMATS = pytest.mark.parametrize("file_format", ["torch", "dcp"])


def keeper_of(model, directory, **settings):
    return BestKeeper(model, directory=directory, metric_key="loss", rank_timeout=20, **settings)


class Stage(nn.Module):
    """A stage of a pipeline: some of the layers of the whole, under the names that they have there."""

    def __init__(self, numbers):
        super().__init__()
        self.layers = nn.ModuleDict({str(number): nn.Linear(3, 3) for number in numbers})
        for number in numbers:
            set_weights(self.layers[str(number)], float(number))
            self.layers[str(number)].register_buffer("seen", torch.tensor(number))
        last = self.layers[str(max(numbers))]
        last.head = nn.Parameter(last.weight.detach().clone().bfloat16())
        last.tied = last.head


def keep_stages(directory, file_format, wrap):
    rank, size = dist.get_rank(), dist.get_world_size()
    model = Stage([number for number in range(5) if number * size // 5 == rank])
    if wrap != "plain":
        pairs = [dist.new_group([2 * n, 2 * n + 1]) for n in range(size // 2)]
        stage, pair = rank // 2, pairs[rank // 2]
        model = Stage([number for number in range(4) if number // 2 == stage])
        if wrap == "fsdp1":
            model = FullyShardedDataParallel(model.float(), process_group=pair, device_id=CPU)
        else:
            fully_shard(model, mesh=DeviceMesh.from_group(pair, "cpu"))
    with keeper_of(model, directory, format=file_format, async_save=file_format == "torch") as keeper:
        for number in (1, 2):
            keeper.observe(1.0 / number, update(number))
        keeper.flush()
    if rank > 0:
        return None
    [state] = read_files(keeper.best_path, file_format).values()
    return state


@pytest.mark.parametrize("file_format", ["torch", "safetensors", "dcp"])
@pytest.mark.parametrize(("wrap", "world_size"), [("plain", 1), ("plain", 2), ("plain", 3), ("fsdp2", 4), ("fsdp1", 4)])
def test_stages_of_a_pipeline_are_kept_as_one_model(wrap, world_size, file_format, tmp_path):
    if (wrap, file_format) == ("fsdp1", "dcp"):
        pytest.skip("refused at the start")
    state = run_ranks(keep_stages, world_size, tmp_path, file_format, wrap)[0]
    stages = 4 if wrap != "plain" else 5
    lasts = (
        {1, 3}
        if wrap != "plain"
        else {max(n for n in range(5) if n * world_size // 5 == rank) for rank in range(world_size)}
    )
    expected = {}
    for number in range(stages):
        layer = Stage([number]).layers[str(number)].state_dict()
        kept = {key: value for key, value in layer.items() if number in lasts or key not in ("head", "tied")}
        expected |= {
            f"layers.{number}.{key}": value.float() if wrap == "fsdp1" and value.is_floating_point() else value
            for key, value in kept.items()
        }
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert same_bits(state[key], value.detach().clone()), key


def stage_of(rank, world_size):
    return Stage([number for number in range(5) if number * world_size // 5 == rank])


def emptied(model):
    for tensor in model.state_dict().values():
        tensor.fill_(99)
    return model


def same_state(found, expected):
    return found.keys() == expected.keys() and all(same_bits(found[key], expected[key]) for key in expected)


def keep_and_load_stages(directory, file_format):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = stage_of(rank, world_size)
    with keeper_of(model, directory, format=file_format) as keeper:
        keeper.observe(1.0, update(1))
        emptied(model)
        keeper.restore_best()
    loaded = load(directory, "best_model.loss", target := emptied(stage_of(rank, world_size)))
    expected = stage_of(rank, world_size).state_dict()
    return same_state(model.state_dict(), expected), same_state(target.state_dict(), expected), loaded.left_alone


@pytest.mark.parametrize("file_format", ["torch", "safetensors", "dcp"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_kept_stages_load_into_stages_and_into_a_whole_model(world_size, file_format, tmp_path):
    assert run_ranks(keep_and_load_stages, world_size, tmp_path, file_format) == [(True, True, ())] * world_size
    whole = nn.Module()
    whole.layers = nn.ModuleDict(
        item for rank in range(world_size) for item in stage_of(rank, world_size).layers.items()
    )
    expected = {key: value.clone() for key, value in whole.state_dict().items()}
    load(tmp_path, "best_model.loss", emptied(whole))
    assert same_state(whole.state_dict(), expected)
    assert whole.layers["4"].head is whole.layers["4"].tied


def copy_of_the_first_stage(world_size):
    """The last stage has the embedding once more, for its head, which comes before it."""
    model = nn.Module()
    if dist.get_rank() == world_size - 1:
        model.head = nn.Linear(3, 3, bias=False)
    model.embedding = nn.Linear(3, 3, bias=False)
    if dist.get_rank() == world_size - 1:
        model.embedding.weight = model.head.weight
    set_weights(model, 4.0)
    return model


def keep_tied_stages(directory, file_format):
    with keeper_of(copy_of_the_first_stage(2), directory, format=file_format, save_timeout=20) as keeper:
        keeper.observe(1.0, update(1))


@FORMATS
def test_weight_of_a_lower_stage_tied_on_a_later_one_is_kept(file_format, tmp_path):
    run_ranks(keep_tied_stages, 2, tmp_path, file_format)
    whole = nn.ModuleDict({name: nn.Linear(3, 3, bias=False) for name in ("embedding", "head")})
    load(tmp_path, "best_model.loss", whole)
    assert {value for tensor in whole.parameters() for value in tensor.flatten().tolist()} == {4.0}


def reported(role, **firsts):
    form = Form(role, (2,), "float32", "strided", "", False)
    return Report({Name("model", key): Entry(form, (), "cpu", first) for key, first in firsts.items()}, {})


@pytest.mark.parametrize(("role", "first"), [("parameter", "a"), ("buffer", "")])
def test_names_tied_on_other_ranks_lead_to_one_that_is_stored(role, first):
    union = unite([reported(role, a="", b="a"), reported(role, b="", c="b")])
    assert {name.key: holding.entry.first for name, holding in union.holdings.items()} == {
        "a": "",
        "b": "a",
        "c": first,
    }


class WithState(nn.Linear):
    def get_extra_state(self):
        return {"seen": [7, "x"]}

    def set_extra_state(self, state):
        self.seen = state


def keep_state_of_a_stage(directory, file_format):
    model = nn.ModuleDict({f"stage{dist.get_rank()}": WithState(2, 2)})
    with keeper_of(model, directory, format=file_format) as keeper:
        keeper.observe(1.0, update(1))
    if dist.get_rank() > 0:
        return None
    [path] = keeper.best_path.glob("*.pt")
    return torch.load(path, weights_only=True)


@FORMATS
def test_extra_state_of_another_stage_is_kept(file_format, tmp_path):
    state = run_ranks(keep_state_of_a_stage, 2, tmp_path, file_format)[0]
    for stage in (0, 1):
        assert state[f"stage{stage}._extra_state"] == {"seen": [7, "x"]}

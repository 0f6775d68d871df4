"""The ranks agree on what they hold: at the start, and again before each save."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel

from keepbest import BestKeeper
from keepbest.capture.fingerprint import _reduced
from keepbest.errors import ConfigError, RankFailedError
from tests.kit.models import Around
from tests.kit.pool import run_ranks
from tests.kit.runs import refs, set_weights, update
from tests.kit.strategies import CPU, WRAPS
from tests.test_ranks import counted_collectives

REF = "best_model.loss"
FORMATS = pytest.mark.parametrize("file_format", ["torch", "dcp"])


def keeper_of(model, directory, **settings):
    return BestKeeper(model, directory=directory, metric_key="loss", rank_timeout=20, **settings)


class Experts(nn.Module):
    """A router that all ranks share, and experts that each rank has for itself, under one name."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(4, 4)
        self.experts = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        set_weights(self, 1.0)
        set_weights(self.experts, float(dist.get_rank()))


def own_experts():
    return Experts()


def one_row_of_many():
    model = nn.Embedding(100_000, 8)
    set_weights(model, 1.0)
    with torch.no_grad():
        model.weight[77_777, 3] += dist.get_rank() == 1
    return nn.ModuleDict({"experts": model})


def experts_sharded_over_a_part_of_the_mesh():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("expert", "data"))
    model = Experts()
    set_weights(model.experts, float(mesh["expert"].get_local_rank()))
    fully_shard(model.experts, mesh=mesh["data"])
    return fully_shard(model, mesh=init_device_mesh("cpu", (4,)))


def replicated_dtensor_that_is_not_equal():
    model = nn.ModuleDict({"experts": nn.Linear(4, 4, bias=False)})
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    local = torch.full((4, 4), float(dist.get_rank()))
    model.experts.weight = nn.Parameter(DTensor.from_local(local, mesh, [Replicate()], run_check=False))
    return model


def fsdp1_on_groups_of_their_own():
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    experts = nn.Linear(4, 4)
    set_weights(experts, float(dist.get_rank() // 2))
    pair = pairs[dist.get_rank() // 2]
    return nn.ModuleDict({"experts": FullyShardedDataParallel(experts, process_group=pair, device_id=CPU)})


def own_experts_in_a_wrapper():
    return Around(own_experts())


def refuse(make, directory, file_format):
    model = make()
    with pytest.raises(ConfigError) as caught:
        keeper_of(model, directory, format=file_format).start()
    return str(caught.value)


@FORMATS
@pytest.mark.parametrize(
    ("make", "world_size", "ranks"),
    [
        (own_experts, 2, "ranks 0, 1"),
        (own_experts, 3, "ranks 0, 1, 2"),
        (own_experts_in_a_wrapper, 2, "ranks 0, 1"),
        (one_row_of_many, 3, "ranks 0, 1"),
        (experts_sharded_over_a_part_of_the_mesh, 4, "ranks 0, 1, 2, 3"),
        (replicated_dtensor_that_is_not_equal, 2, "ranks 0, 1"),
        (fsdp1_on_groups_of_their_own, 4, "ranks 0, 1, 2, 3"),
    ],
)
def test_other_weights_under_one_name_are_refused_at_start(make, world_size, ranks, file_format, tmp_path):
    messages = run_ranks(refuse, world_size, make, tmp_path / "run", file_format)
    assert len({message.partition("ConfigError: ")[2] or message for message in messages}) == 1
    if file_format == "dcp" and make is fsdp1_on_groups_of_their_own:
        assert "units are sharded over ranks [0, 1] of [0, 1, 2, 3]" in messages[0]
        return
    assert messages[0].startswith(f"{ranks} hold different weights under the same name: experts.")
    assert "process_group" in messages[0]
    assert "DTensors over all ranks" in messages[0]
    assert not (tmp_path / "run").exists()


def keep_equal_copies_on_parts_of_the_mesh(directory, file_format):
    model = Experts()
    set_weights(model, 3.0)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "data"))
    fully_shard(model, mesh=mesh["data"])
    with keeper_of(model, directory, format=file_format) as keeper:
        return keeper.observe(1.0, update(1)).is_new_best


@FORMATS
def test_equal_copies_of_sharded_weights_are_kept(file_format, tmp_path):
    assert run_ranks(keep_equal_copies_on_parts_of_the_mesh, 4, tmp_path, file_format) == [True] * 4


def test_fingerprint_on_an_accelerator_covers_bytes_and_places():
    values = torch.arange(1003, dtype=torch.int64).to(torch.uint8)
    swapped, changed = values.clone(), values.clone()
    swapped[:8], swapped[8:16] = values[8:16], values[:8]
    changed[1002] += 1
    assert len({_reduced(each) for each in (values, values.clone(), swapped, changed)}) == 3


def test_fingerprint_on_an_accelerator_covers_places_in_each_piece(monkeypatch):
    monkeypatch.setattr("keepbest.capture.fingerprint._WORDS_AT_ONCE", 4)  # what it really is takes long
    values = torch.arange(100, dtype=torch.int64)
    moved, within = values.roll(4), torch.cat([values[:1].roll(0), values[1:4].roll(1), values[4:]])
    assert len({_reduced(each.view(torch.uint8)) for each in (values, values.clone(), moved, within)}) == 3


def three_layers():
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)))
    for number, layer in enumerate(model):
        set_weights(layer, float(number))
    return model


def freeze(wrap, directory, victims, file_format):
    model = (
        WRAPS[wrap](three_layers())
        if wrap != "fsdp2"
        else fully_shard(three_layers(), mesh=init_device_mesh("cpu", (2,)))
    )
    with keeper_of(model, directory, save_frozen_weights=False, format=file_format) as keeper:
        keeper.observe(2.0, update(1))
        if dist.get_rank() in victims:
            next(model.parameters()).requires_grad_(False)
        try:
            return keeper.observe(1.0, update(2)).is_new_best
        except ConfigError as error:
            found = str(error)
        assert keeper.best_metric_value == 2.0  # nothing moved, and the ranks may go on
        next(model.parameters()).requires_grad_(True)
        assert keeper.observe(1.0, update(3)).is_new_best
        return found


@FORMATS
@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_layer_frozen_on_one_rank_is_refused_before_any_move(wrap, file_format, tmp_path):
    messages = run_ranks(freeze, 2, wrap, tmp_path, [0], file_format)
    assert messages[0] == messages[1]
    assert "do not agree on whether '0.weight' is frozen" in messages[0]
    assert "this has changed: on rank 0: '0.weight' was frozen" in messages[0]


@FORMATS
def test_layer_that_all_ranks_froze_is_left_out(file_format, tmp_path):
    assert run_ranks(freeze, 2, "ddp", tmp_path, [0, 1], file_format) == [True, True]


def wrap_later(directory, use_orig_params, is_inner):
    model = three_layers()
    kept = model[0] if is_inner else model
    with keeper_of(kept, directory) as keeper:
        FullyShardedDataParallel(model, device_id=CPU, use_orig_params=use_orig_params)
        with pytest.raises(ConfigError) as caught:
            keeper.observe(1.0, update(1))
    with pytest.raises(ConfigError, match="lies in a flat parameter of FSDP1"):
        keeper_of(kept, directory, id="late").start()
    return str(caught.value)


@pytest.mark.parametrize("is_inner", [False, True])
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_around_the_model_of_a_keeper_is_refused(use_orig_params, is_inner, tmp_path):
    for message in run_ranks(wrap_later, 2, tmp_path, use_orig_params, is_inner):
        assert "lies in a flat parameter of FSDP1" in message
        assert "Since the keeper started this has changed" in message


def shard_by_hand_later(directory):
    model = three_layers()
    with keeper_of(model, directory) as keeper:
        keeper.observe(2.0, update(1))
        model[0].weight = nn.Parameter(torch.full((4, 8), float(dist.get_rank())))
        with pytest.raises(ConfigError) as caught:
            keeper.observe(1.0, update(2))
    return str(caught.value)


def test_weights_split_by_hand_after_the_start_are_refused(tmp_path):
    for message in run_ranks(shard_by_hand_later, 2, tmp_path):
        assert "ranks 0, 1 hold different weights under the same name: 0.weight" in message
        assert "'0.weight' was a parameter of shape [8, 8]" in message


def bring_a_layer_of_another_rank(directory, value):
    model = nn.ModuleDict({"own": nn.Linear(2, 2)})
    set_weights(model, 1.0)
    if dist.get_rank() == 0:
        model["extra"] = nn.Linear(2, 2, bias=False)
        set_weights(model["extra"], 1.0)
    with keeper_of(model, directory) as keeper:
        keeper.observe(2.0, update(1))
        if dist.get_rank() == 1:
            model["extra"] = nn.Linear(2, 2, bias=False)
            set_weights(model["extra"], value)
        try:
            return str(keeper.observe(1.0, update(2)).is_new_best)
        except ConfigError as error:
            return str(error)


@pytest.mark.parametrize(
    ("value", "found"), [(1.0, "True"), (2.0, "ranks 0, 1 hold different weights .* extra.weight")]
)
def test_layer_added_later_is_compared_with_that_of_another_rank(value, found, tmp_path):
    for message in run_ranks(bring_a_layer_of_another_rank, 2, tmp_path, value):
        assert re.match(found, message), message


def change_in_ways_that_can_be_kept(directory):
    model = three_layers()
    with keeper_of(model, directory) as keeper:
        keeper.observe(3.0, update(1))
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        keeper.observe(2.0, update(2))
        model.append(nn.Linear(2, 2, bias=False))
        set_weights(model[3], 4.0)
        keeper.observe(1.0, update(3))
        with counted_collectives() as found:
            keeper.observe(0.5, update(4))
    state = torch.load(keeper.best_path / "model.pt", weights_only=True) if dist.get_rank() == 0 else {}
    return {key: (tuple(value.shape), value.flatten()[-1].item()) for key, value in state.items()}, len(found)


def test_changes_that_are_the_same_on_all_ranks_are_kept(tmp_path):
    (state, collectives), _ = run_ranks(change_in_ways_that_can_be_kept, 2, tmp_path)
    assert state == {**{f"{n}.weight": ((8, 8), float(n)) for n in range(3)}, "3.weight": ((2, 2), 4.0)}
    # The value, the catalogue, the outcome and its text; no more once the change is known.
    assert collectives <= 4 + 2 * 3


def run_out_of_memory(directory, wrap, in_background):
    model = nn.Linear(4000, 4000)
    set_weights(model, 1.0)
    model = DistributedDataParallel(model) if wrap == "ddp" else fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    keeper = keeper_of(model, directory, async_save=in_background)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if dist.get_rank() == 0:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 50_000_000, limits[1]))
    messages = []
    try:
        keeper.start()
        for number in range(1, 4):
            with pytest.raises(RankFailedError) as caught:
                keeper.observe(1.0 / number, update(number))
            messages.append(str(caught.value))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    # Where the memory is there again, training goes on, and no slot was lost.
    assert keeper.observe(0.1, update(9)).is_new_best
    keeper.close()
    return messages


@pytest.mark.parametrize(("wrap", "in_background"), [("ddp", True), ("fsdp2", True), ("fsdp2", False)])
def test_rank_0_without_memory_is_an_error_before_any_move(wrap, in_background, tmp_path):
    mine, others = run_ranks(run_out_of_memory, 2, tmp_path, wrap, in_background)
    assert mine == others
    assert all("list the weights" in message and "on rank 0 of 2" in message for message in mine)


def save_when_nothing_can_be_connected(directory, file_format):
    rank = dist.get_rank()
    # In `torch` rank 1 has a stage of a pipeline, which has to travel.
    model = nn.ModuleDict({f"stage{rank if file_format == 'torch' else 0}": nn.Linear(2, 2)})
    set_weights(model, 1.0)
    keeper = keeper_of(model, directory, format=file_format)
    keeper.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(dist, "ProcessGroupGloo")  # of torch: what would be connected late shows
        is_new_best = keeper.observe(1.0, update(1)).is_new_best
    keeper.close()
    return is_new_best


@FORMATS
def test_all_connections_are_made_at_the_start(file_format, tmp_path):
    # Who is being connected does not notice that another rank dies, and would wait for as long as for a slow disk.
    assert run_ranks(save_when_nothing_can_be_connected, 2, tmp_path, file_format) == [True, True]


def swap_between_keepers(directory, swap, wrap):
    model = three_layers()
    if wrap == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    keepers = [keeper_of(model, directory, id=name) for name in ("raw", "average")]
    with keepers[0], keepers[1]:
        for number in (1, 2):
            set_weights(model, float(number))
            keepers[0].observe(1.0 / number, update(number))
            if number == 1:
                swap(model)
            keepers[1].observe(1.0 / number, update(number))
            if dist.is_initialized() and dist.get_rank() > 0:
                continue
            states = [torch.load(each.best_path / "model.pt", weights_only=True) for each in keepers]
            if number == 1:
                first = [state["0.weight"][7, 0].item() for state in states]
        names = refs(directory) if not dist.is_initialized() or dist.get_rank() == 0 else {}
    return (first, len(set(names.values()))) if names else None


def copy_into(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.full_like(parameter, 7.0))


def copy_past_the_count_of_changes(model):
    for parameter in model.parameters():
        parameter.data.copy_(torch.full_like(parameter.data, 7.0))


def exchange_data(model):
    for parameter in model.parameters():
        parameter.data = torch.full_like(parameter.data, 7.0)


@pytest.mark.parametrize("swap", [copy_into, copy_past_the_count_of_changes, exchange_data])
def test_weights_swapped_between_two_keepers_make_two_snapshots(swap, tmp_path):
    assert swap_between_keepers(tmp_path, swap, "single") == ([1.0, 7.0], 1)


class WithScale(nn.Linear):
    scale = 1.0

    def get_extra_state(self):
        return {"scale": self.scale}

    def set_extra_state(self, state):
        self.scale = state["scale"]


def test_extra_state_swapped_between_two_keepers_makes_two_snapshots(tmp_path):
    model = WithScale(2, 2)
    with keeper_of(model, tmp_path, id="raw") as raw, keeper_of(model, tmp_path, id="average") as average:
        raw.observe(1.0, update(1))
        model.scale = 7.0
        average.observe(1.0, update(1))
        states = [torch.load(each.best_path / "model.pt", weights_only=True) for each in (raw, average)]
    assert [state["_extra_state"]["scale"] for state in states] == [1.0, 7.0]


def test_swapped_shards_make_two_snapshots(tmp_path):
    assert run_ranks(swap_between_keepers, 2, tmp_path, copy_into, "fsdp2")[0] == ([1.0, 7.0], 1)

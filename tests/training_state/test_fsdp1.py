"""Optimizers of FSDP1 units, with the parameters of the user and with flat ones."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    ShardingStrategy,
    StateDictType,
)

from keepbest import BestKeeper, load
from keepbest.errors import ConfigError, SnapshotError
from tests.kit.pool import run_ranks
from tests.kit.runs import update
from tests.kit.strategies import CPU, fsdp1, fsdp2, single
from tests.training_state.loop import BEST, Net, Training, differing, whole
from tests.training_state.test_continue import OPTIMIZERS, SETTINGS, by_columns


def trainable(model: nn.Module) -> nn.Module:
    """Without original parameters, a unit is frozen as a whole or not."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def flat(model: nn.Module) -> nn.Module:
    return fsdp1(trainable(model), use_orig_params=False)


def flat_blocks(model: nn.Module) -> nn.Module:
    trainable(model).module = fsdp1(model.module, use_orig_params=False)
    return fsdp1(model, use_orig_params=False)


def blocks(model: nn.Module) -> nn.Module:
    model.module = fsdp1(model.module)
    return fsdp1(model)


def partly(model: nn.Module) -> nn.Module:
    """Beside the unit are parameters that every rank has whole."""
    model.module = fsdp1(model.module)
    return model


def columns(model: nn.Module) -> nn.Module:
    return fsdp1(by_columns(model))


def flat_columns(model: nn.Module) -> nn.Module:
    return flat(by_columns(model))


def unsharded_columns(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(
        by_columns(model), device_id=CPU, use_orig_params=True, sharding_strategy=ShardingStrategy.NO_SHARD
    )


WRAPS = {
    "orig": fsdp1, "blocks": blocks, "flat": flat, "flat blocks": flat_blocks, "partly": partly, "columns": columns,
    "flat columns": flat_columns, "unsharded columns": unsharded_columns,
}  # fmt: skip


def digest(training):
    """All that there is, as torch itself brings it to rank 0. Collective."""
    with FullyShardedDataParallel.summon_full_params(training.model, writeback=False):
        weights = {name: each.tolist() for name, each in training.model.named_parameters()}
    whole = (
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(),
        FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=False),
    )
    with FullyShardedDataParallel.state_dict_type(training.model, *whole):
        state = FullyShardedDataParallel.optim_state_dict(training.model, training.optimizer)
    found = {
        f"{name}/{key}": value.tolist() if isinstance(value, torch.Tensor) else value
        for name, values in state["state"].items()
        for key, value in values.items()
    }
    return {**weights, **found, "groups": str(state["param_groups"])}


def continue_all(directory, cases):
    """What differs after a resume in each case."""
    found = {}
    for wrap, name, settings in cases:
        folder = directory / str(len(found))
        training, again = (Training(WRAPS[wrap], OPTIMIZERS[name], seed=seed) for seed in (1, 2))
        for each in (training, again):
            each.everything = partial(digest, each)
        uninterrupted = training.keep(folder, **settings)
        found[wrap, name, str(settings)] = differing(again.resume(folder), uninterrupted)
    return {case: wrong for case, wrong in found.items() if wrong}


CASES = [
    ("orig", "adamw", {}),
    ("orig", "sgd", SETTINGS[1]),
    ("orig", "adamw", SETTINGS[-1]),
    ("blocks", "groups", SETTINGS[2]),
    ("blocks", "adamw", SETTINGS[3]),
    ("flat", "adamw", {}),
    ("flat", "sgd", SETTINGS[-1]),
    ("flat blocks", "adamw", SETTINGS[1]),
    ("flat blocks", "adamw", SETTINGS[3]),
    ("columns", "adamw", {}),
    ("flat columns", "adamw", SETTINGS[1]),
    ("unsharded columns", "adamw", SETTINGS[3]),
]


@pytest.mark.parametrize("world_size", [2, 3])
def test_fsdp1_training_continues_from_the_best(world_size, tmp_path):
    cases = CASES if world_size == 2 else CASES[2:6:3]
    for found in run_ranks(continue_all, world_size, tmp_path, cases):
        assert found == {}


def resume(directory, wrap):
    """All that there is after the load, and two updates later. A flat parameter has no names of its own."""
    training = Training(OTHERS[wrap], OPTIMIZERS["adamw"], seed=2)
    if wrap in WRAPS:
        training.everything = partial(digest, training)
    found = training.resume(directory)
    return {number: numbers(found[number]) for number in (2, 4)}


def numbers(everything):
    """The numbers of the weights and states, by name."""
    named = {name.replace("_fsdp_wrapped_module.", ""): value for name, value in everything.items()}
    return {name: torch.tensor(value) for name, value in named.items() if name != "groups"}


OTHERS = {"single": single, "trainable": trainable, "fsdp2": fsdp2, **WRAPS}


def keep_and_digest(directory, wrap, settings):
    training = Training(OTHERS[wrap], OPTIMIZERS["adamw"])
    if wrap in WRAPS:
        training.everything = partial(digest, training)
    found = training.keep(directory, **settings)
    return {number: numbers(found[number]) for number in (2, 4)}


@pytest.mark.parametrize(
    ("here", "there", "size", "settings"),
    [
        ("orig", "single", 1, {}),
        ("orig", "fsdp2", 2, SETTINGS[-1]),
        ("fsdp2", "blocks", 2, SETTINGS[-1]),
        ("flat blocks", "trainable", 1, SETTINGS[3]),
        ("trainable", "flat", 3, {}),
        ("columns", "single", 1, {}),
        ("fsdp2", "columns", 2, SETTINGS[-1]),
        ("trainable", "flat columns", 2, {}),
    ],
    ids=str,
)
def test_state_of_units_comes_back_elsewhere(here, there, size, settings, tmp_path):
    before = run_ranks(keep_and_digest, 1 if here == "trainable" else 2, tmp_path, here, settings)[0]
    for after in run_ranks(resume, size, tmp_path, there):
        for number, tolerance in ((2, 0.0), (4, 1e-5)):
            assert before[number].keys() == after[number].keys()
            for name, value in before[number].items():
                torch.testing.assert_close(after[number][name], value, atol=tolerance, rtol=0.0, msg=name)


def start_with_units_apart(directory):
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    hybrid = FullyShardedDataParallel(
        Net(), device_mesh=mesh, device_id=CPU, sharding_strategy=ShardingStrategy.HYBRID_SHARD, use_orig_params=True
    )
    optimizer = torch.optim.SGD(hybrid.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="cannot be kept where units are sharded over ranks") as caught:
        BestKeeper(hybrid, directory=directory, metric_key="loss", training_state={"optimizer": optimizer}).start()
    mixed = Net()
    mixed.module = fsdp1(trainable(mixed).module, use_orig_params=False)
    mixed.second = fsdp1(mixed.second)
    optimizer = torch.optim.SGD(mixed.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="cannot be kept where units differ in use_orig_params"):
        BestKeeper(mixed, directory=directory, metric_key="loss", training_state={"optimizer": optimizer}).start()
    return str(caught.value)


def test_units_over_some_of_the_ranks_are_refused(tmp_path):
    first, second = run_ranks(start_with_units_apart, 2, tmp_path)
    assert first == second
    assert "Use FSDP2" in first


def load_unsharded_columns(directory):
    """The average of the gradients. (Further updates would not do: there torch has the gradients in another order.)"""
    model = unsharded_columns(Net())
    optimizer = OPTIMIZERS["adamw"](model)
    load(directory, BEST, model, training_state={"optimizer": optimizer})
    return optimizer.state[model.module.module.weight]["exp_avg"].tolist()


def test_state_of_units_that_are_not_cut_keeps_its_order(tmp_path):
    before = Training(single, OPTIMIZERS["adamw"]).keep(tmp_path)[2]
    assert run_ranks(load_unsharded_columns, 2, tmp_path) == [before["module.weight/exp_avg"]] * 2


def keep_columns(directory):
    training = Training(columns, OPTIMIZERS["adamw"])
    with pytest.raises(ConfigError, match=r"'module.weight', does not lie in memory row by row.* Use format 'torch'"):
        training.keep(directory, format="dcp")


def test_state_in_another_order_is_refused_by_dcp_at_start(tmp_path):
    run_ranks(keep_columns, 2, tmp_path)
    assert list(tmp_path.iterdir()) == []


def whole_after_forward(model):
    strategy = ShardingStrategy.SHARD_GRAD_OP
    return FullyShardedDataParallel(model, device_id=CPU, use_orig_params=True, sharding_strategy=strategy)


def observe_before_backward(directory):
    """torch gives the state of units that are sharded alone."""
    training = Training(whole_after_forward, OPTIMIZERS["adamw"])
    with BestKeeper(training.model, directory=directory, metric_key="loss", training_state=training.state) as keeper:
        training.step(1)
        loss = training.model(torch.ones(2, 5)).sum()
        with pytest.raises(
            ConfigError, match=r"no parameter of the model.* evaluate in torch\.no_grad\(\), and observe"
        ):
            keeper.observe(1.0, update(1))
        loss.backward()
        keeper.observe(1.0, update(2))
        with torch.no_grad():
            training.model(torch.ones(2, 5))
        return keeper.observe(0.5, update(3)).is_new_best


def test_state_of_units_that_are_whole_is_refused(tmp_path):
    assert run_ranks(observe_before_backward, 2, tmp_path) == [True, True]


def keep_two_optimizers(directory):
    """What differs where one optimizer has the parameters of a unit, and another one the others."""
    found = []
    for settings in (SETTINGS[1], SETTINGS[-1]):
        folder = directory / settings.get("format", "torch")
        trainings = [Training(partly, OPTIMIZERS["adamw"], seed=seed) for seed in (1, 2)]
        for training in trainings:
            inside = list(training.model.module.parameters())
            outside = [each for each in training.model.parameters() if all(each is not other for other in inside)]
            training.optimizer = torch.optim.AdamW(inside, lr=0.02)
            training.others = {"second": Stepped(outside, lr=0.03, momentum=0.9)}
            training.everything = partial(weights_and_state, training)
        uninterrupted = trainings[0].keep(folder, **settings)
        found += differing(trainings[1].resume(folder), uninterrupted)
    return found


class Stepped(torch.optim.SGD):
    """An optimizer that the loop steps like a scheduler."""


def weights_and_state(training):
    with FullyShardedDataParallel.summon_full_params(training.model, writeback=False):
        weights = {name: each.tolist() for name, each in training.model.named_parameters()}
    states = {name: whole(each.state_dict()) for name, each in training.others.items()}
    return {**weights, **states}


def test_optimizers_of_a_unit_and_beside_it_are_kept(tmp_path):
    for found in run_ranks(keep_two_optimizers, 2, tmp_path):
        assert found == []


def keep_more_than_state(directory, wrap, settings):
    """What an optimizer is given that has more in its state dict than state and groups."""
    training, seen = Training(WRAPS[wrap], OPTIMIZERS["sgd"]), []
    training.optimizer.register_state_dict_post_hook(lambda _, state: {**state, "beside": {"rounds": 3}})
    training.optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(state["beside"]))
    training.keep(directory, **settings)
    load(directory, BEST, training.model, training_state=training.state)
    return seen


@pytest.mark.parametrize(("wrap", "settings"), [("orig", SETTINGS[0]), ("flat", SETTINGS[-1])])
def test_what_is_beside_the_state_is_kept(wrap, settings, tmp_path):
    assert run_ranks(keep_more_than_state, 2, tmp_path, wrap, settings) == [[{"rounds": 3}]] * 2


UNLIKE = (
    r"ranks 0, 1 differ in .* the keys of the state of the optimizer 'optimizer' for the unit of FSDP1 with 'module"
)


def keep_unlike_states(directory, wrap, settings):
    """The state is kept once it is alike, since nothing was lost before."""
    training = Training(WRAPS[wrap], OPTIMIZERS["adamw"])
    lbfgs = {"it": torch.optim.LBFGS(training.model.parameters())}
    with pytest.raises(ConfigError, match="'it': the state of LBFGS belongs to all parameters together"):
        BestKeeper(training.model, directory=directory, metric_key="loss", training_state=lbfgs).start()
    with BestKeeper(
        training.model, directory=directory, metric_key="loss", training_state=training.state, **settings
    ) as keeper:
        training.model(torch.ones(2, 5)).sum().backward()
        if dist.get_rank() == 0:
            training.optimizer.step()
        with pytest.raises(ConfigError, match=UNLIKE):
            keeper.observe(3.0, update(1))
        if dist.get_rank() == 1:
            training.optimizer.step()
        keeper.observe(2.0, update(2))
        state = next(each for each in training.optimizer.state.values() if each["exp_avg"].numel())
        right, state["exp_avg"] = state["exp_avg"], [state["exp_avg"]]
        with pytest.raises(ConfigError, match=r"'exp_avg' of the optimizer for .* is a list, which is not like the"):
            keeper.observe(1.0, update(3))
        state["exp_avg"] = right
        less = {id(right): state for right, state in training.optimizer.state.items()}
        some = next(right for right in training.optimizer.state if right.numel())
        del training.optimizer.state[some]
        if wrap == "orig":
            with pytest.raises(ConfigError, match=r"the optimizer has state for .*, and none for"):
                keeper.observe(0.5, update(4))
        training.optimizer.state[some] = less[id(some)]
        keeper.observe(0.25, update(5))
    load(directory, BEST, training.model, training_state=training.state)


@pytest.mark.parametrize(("wrap", "settings"), [("orig", {}), ("flat", SETTINGS[-1])], ids=str)
def test_state_that_units_cannot_have_is_refused(wrap, settings, tmp_path):
    run_ranks(keep_unlike_states, 2, tmp_path, wrap, settings)


def load_factors(directory):
    again = Training(fsdp1, OPTIMIZERS["adafactor"], seed=2)
    before = digest(again)
    with pytest.raises(SnapshotError, match="Adafactor has other state where FSDP1 makes parameters flat"):
        load(directory, BEST, again.model, training_state=again.state)
    assert digest(again) == before


def test_factors_of_matrices_are_not_loaded_into_units(tmp_path):
    Training(single, OPTIMIZERS["adafactor"]).keep(tmp_path)
    run_ranks(load_factors, 2, tmp_path)

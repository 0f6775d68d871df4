"""Training states that are sharded, and that come back into another strategy and another number of ranks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from keepbest import BestKeeper, load
from keepbest.errors import ConfigError, SnapshotError
from tests.kit.pool import run_ranks
from tests.kit.runs import update
from tests.kit.strategies import ddp, fsdp2, fsdp2_replicated, single
from tests.training_state.loop import BEST, FEATURES, Training, differing
from tests.training_state.test_continue import OPTIMIZERS, SETTINGS, grouped

FEW = ["sgd", "adamw foreach", "adamw fused", "names", "groups"]


def tensor_parallel(model: nn.Module) -> nn.Module:
    return _in_tensor_parallel(model, init_device_mesh("cpu", (dist.get_world_size(),)))


def _in_tensor_parallel(model, mesh):
    return parallelize_module(model, mesh, {"module": ColwiseParallel(), "second": RowwiseParallel()})


def fsdp2_nested(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def two_dimensional(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    return fully_shard(_in_tensor_parallel(model, mesh["tensor"]), mesh=mesh["data"])


WRAPS = {
    "single": single,
    "ddp": ddp,
    "fsdp2": fsdp2,
    "fsdp2 nested": fsdp2_nested,
    "fsdp2 replicated": fsdp2_replicated,
    "tensor parallel": tensor_parallel,
    "two dimensions": two_dimensional,
}


def continue_all(directory, wrap, optimizers, settings):
    """What differs after a resume, for each optimizer and each way to save."""
    found = {}
    for name, each in ((name, each) for name in optimizers for each in settings):
        make, folder = OPTIMIZERS[name], directory / f"{name}{len(found)}"
        uninterrupted = Training(WRAPS[wrap], make).keep(folder, **each)
        again = Training(WRAPS[wrap], partial(grouped, reverse=True) if make is grouped else make, seed=2)
        found[name, str(each)] = differing(again.resume(folder), uninterrupted)
    return {case: wrong for case, wrong in found.items() if wrong}


@pytest.mark.parametrize(
    ("wrap", "world_size", "optimizers", "settings"),
    [
        ("fsdp2", 2, FEW, SETTINGS[:1] + SETTINGS[-1:]),
        ("fsdp2 nested", 3, ["adamw foreach"], SETTINGS[1:4:2]),
        ("fsdp2 replicated", 4, ["groups"], SETTINGS[-1:]),
        ("tensor parallel", 2, ["groups"], SETTINGS[:1] + SETTINGS[-1:]),
        ("two dimensions", 4, ["adamw"], SETTINGS[2:4]),
    ],
    ids=str,
)
def test_sharded_training_continues_from_the_best(wrap, world_size, optimizers, settings, tmp_path):
    for found in run_ranks(continue_all, world_size, tmp_path, wrap, optimizers, settings):
        assert found == {}


def keep(directory, wrap, settings):
    return Training(WRAPS[wrap], OPTIMIZERS["adamw foreach"]).keep(directory, **settings)


def resume(directory, wrap):
    return Training(WRAPS[wrap], OPTIMIZERS["adamw"], seed=2).resume(directory)


@pytest.mark.parametrize("settings", [SETTINGS[2], SETTINGS[-1]], ids=str)
def test_state_comes_back_into_other_strategies_and_ranks(settings, tmp_path):
    for here, size in (("fsdp2 nested", 2), ("two dimensions", 4)):
        directory = tmp_path / here
        uninterrupted = run_ranks(keep, size, directory, here, settings)[0]
        for there, others in (("single", 1), ("ddp", 2), ("fsdp2", 3), ("tensor parallel", 2)):
            for found in run_ranks(resume, others, directory, there):
                assert (
                    differing({2: weights_of(found[2])}, {2: weights_of(uninterrupted[2])}) == []
                )  # bit for bit where nothing is computed
                for number in (3, 4, 5):
                    assert flat(found[number]) == pytest.approx(flat(uninterrupted[number]), abs=1e-5)


def weights_of(everything):
    """All but the groups, whose options say also how the strategy computes."""
    return {name: value for name, value in everything.items() if name != "groups"}


def flat(everything):
    """All numbers of the tensors."""
    return [each for value in weights_of(everything).values() for each in torch.tensor(value).flatten().tolist()]


def keep_after_evaluation(directory):
    """What differs where the parameters are whole ones when the keeper, and load, come to them."""
    training = Training(fsdp2_nested, OPTIMIZERS["sgd"])
    batch = torch.ones(1, FEATURES)
    with BestKeeper(
        training.model, directory=directory, metric_key="loss", training_state=training.state, model_names=["module"]
    ) as keeper:
        training.step(1)
        with torch.no_grad():
            training.model(batch)
        assert {type(each) for each in training.model.parameters()} != {DTensor}
        keeper.observe(1.0, update(1))
    expected = training.everything()
    again = Training(fsdp2_nested, OPTIMIZERS["sgd"])
    with torch.no_grad():
        again.model(batch)
    load(directory, BEST, again.model, training_state=again.state)
    again.model.reshard()
    found = again.everything()
    return [name for name in expected if "/" in name and expected[name] != found.get(name)]


def test_parameters_that_are_whole_after_evaluation_have_names(tmp_path):
    assert run_ranks(keep_after_evaluation, 2, tmp_path) == [[], []]


class OfShards(torch.optim.Optimizer):
    """Keeps what a function makes of each parameter, as optimizers with kernels of their own do of its shard."""

    def __init__(self, parameters, make):
        super().__init__(parameters, {})
        self.make = make

    def step(self, closure=None):
        closure()
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["seen"] = self.make(parameter)


SEEN = r"'seen' of the optimizer for 'module\.weight' "
DIFFERS = r"ranks 0, 1 differ in what must be equal: .*'seen' of the optimizer 'optimizer' for 'module\.weight'"
REFUSED = [
    (lambda parameter: torch.ones_like(parameter.to_local()), SEEN + "is a plain tensor"),
    (lambda parameter: {"a": [parameter.to_local()]}, SEEN + r"has at \['a'\]\[0\] a plain tensor of shape \[4, 5\]"),
    (lambda parameter: parameter.detach().sum(dim=-1, keepdim=True), SEEN + "is a DTensor of shape"),
    (lambda parameter: parameter.to_local().detach().sum(), DIFFERS),
    (lambda parameter: [{"norm": parameter.to_local().sum().item()}], DIFFERS),
]


def keep_shards(directory):
    for number, (make, message) in enumerate(REFUSED):
        training = Training(fsdp2, lambda model, make=make: OfShards(model.parameters(), make))
        with BestKeeper(
            training.model, directory=directory / str(number), metric_key="loss", training_state=training.state
        ) as keeper:
            for again in (1, 2):
                with pytest.raises(ConfigError, match=message):
                    training.run([again], keeper)
            training.optimizer.make = lambda _: [torch.tensor(7.0), {"same": 3}]
            training.run([2], keeper)
    one = fully_shard(nn.Linear(1, 2, bias=False))
    optimizer = OfShards(one.parameters(), lambda parameter: torch.ones_like(parameter.to_local()))
    optimizer.step(list)
    with pytest.raises(ConfigError, match=r"'weight' is a plain tensor of shape \[1, 1\]"):
        BestKeeper(one, directory=directory / "one", metric_key="loss", training_state={"it": optimizer}).start()


def test_plain_state_of_a_shard_is_refused(tmp_path):
    run_ranks(keep_shards, 2, tmp_path)


def of_rows(model):
    """An optimizer whose state for a matrix has one number for each row."""
    return OfShards(model.parameters(), lambda parameter: parameter.detach().sum(dim=-1, keepdim=True))


def load_rows(directory):
    other = Training(fsdp2, of_rows, seed=2)
    before = other.everything()
    with pytest.raises(SnapshotError, match=r"module\.weight/seen has shape \[8, 1\], and module\.weight is sharded"):
        load(directory, BEST, other.model, training_state=other.state)
    assert differing({0: other.everything()}, {0: before}) == []


def test_state_that_nobody_can_share_out_is_refused(tmp_path):
    Training(single, of_rows).keep(tmp_path)
    run_ranks(load_rows, 2, tmp_path)


NOT_IN_SHARDS = {"lbfgs": "the state of LBFGS belongs to all parameters", "adafactor": "Adafactor keeps one state for"}


def start_and_load(directory, name):
    """What is refused where no optimizer has taken a step."""
    for wrap in (fsdp2, fsdp2_replicated, tensor_parallel):
        training = Training(wrap, OPTIMIZERS[name], seed=2)
        before = training.everything()
        with pytest.raises(ConfigError, match=f"training_state 'optimizer': {NOT_IN_SHARDS[name]}"):
            BestKeeper(
                training.model, directory=directory / "none", metric_key="loss", training_state=training.state
            ).start()
        with pytest.raises(SnapshotError, match=f"'optimizer': {NOT_IN_SHARDS[name]}.* Nothing was loaded"):
            load(directory, BEST, training.model, training_state=training.state)
        assert differing({0: training.everything()}, {0: before}) == []


@pytest.mark.parametrize("name", NOT_IN_SHARDS)
def test_optimizer_of_whole_tensors_is_refused_at_start(name, tmp_path):
    Training(single, OPTIMIZERS[name]).keep(tmp_path)
    run_ranks(start_and_load, 2, tmp_path, name)


def load_squares(directory):
    model = fsdp2(nn.Linear(4, 4, bias=False))
    optimizer = OfShards(model.parameters(), torch.ones_like)
    with pytest.raises(SnapshotError, match=r"weight/seen has the shape of weight, which is square and sharded, and"):
        load(directory / "whole", BEST, model, training_state={"it": optimizer})
    with pytest.raises(SnapshotError, match=r"'seen' of weight has inside a tensor of shape \[4, 4\], and weight is"):
        load(directory / "inside", BEST, model, training_state={"it": optimizer})
    optimizer.step(list)
    states = {"it": optimizer}
    with BestKeeper(model, directory=directory / "sharded", metric_key="loss", training_state=states) as keeper:
        keeper.observe(1.0, update(1))
    load(directory / "sharded", BEST, model, training_state=states)
    return optimizer.state[model.weight]["seen"].full_tensor().tolist()


def test_square_state_of_unknown_meaning_is_not_cut(tmp_path):
    for name, make in (("whole", torch.ones_like), ("inside", lambda each: [torch.ones_like(each)])):
        model = nn.Linear(4, 4, bias=False)
        optimizer = OfShards(model.parameters(), make)
        optimizer.step(list)
        states = {"it": optimizer}
        with BestKeeper(model, directory=tmp_path / name, metric_key="loss", training_state=states) as keeper:
            keeper.observe(1.0, update(1))
    assert run_ranks(load_squares, 2, tmp_path) == [[[1.0] * 4] * 4] * 2


class Scaled(nn.Module):
    """With one number that every rank has, as a part of a sharded model."""

    def __init__(self, mesh):
        super().__init__()
        self.scale = nn.Parameter(distribute_tensor(torch.tensor(2.0), mesh, [Replicate()]))

    def step(self, optimizer, number):
        optimizer.zero_grad()
        ((self.scale - number) ** 2).backward()
        optimizer.step()


def keep_a_number(directory, settings):
    """What a state of the number holds after a load and a step, and what it held without."""
    mesh, found = init_device_mesh("cpu", (2,)), []
    models = [Scaled(mesh) for _ in range(2)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False) for model in models]
    with BestKeeper(
        models[0], directory=directory, metric_key="loss", training_state={"optimizer": optimizers[0]}, **settings
    ) as keeper:
        models[0].step(optimizers[0], 1)
        keeper.observe(1.0, update(1))
    load(directory, BEST, models[1], training_state={"optimizer": optimizers[1]})
    for model, optimizer in zip(models, optimizers, strict=True):
        model.step(optimizer, 2)
        state = optimizer.state[model.scale]
        found.append([(key, type(value).__name__, float(value)) for key, value in sorted(state.items())])
    return found


@pytest.mark.parametrize("settings", [{}, {"format": "dcp"}], ids=str)
def test_count_of_steps_is_no_part_of_a_number(settings, tmp_path):
    for uninterrupted, continued in run_ranks(keep_a_number, 2, tmp_path, settings):
        assert continued == uninterrupted

"""Optimizers that are unusual: of stages, with nested state, with hooks, several, or failing on one rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from keepbest import BestKeeper, load
from keepbest.errors import ConfigError, KeepBestError, RankFailedError, SnapshotError
from tests.kit.models import Around
from tests.kit.pool import run_ranks
from tests.kit.runs import update
from tests.kit.strategies import ddp, single
from tests.training_state.loop import BEST, Training, differing
from tests.training_state.test_continue import SETTINGS


@pytest.mark.parametrize("settings", SETTINGS[1::3], ids=str)
def test_state_of_nested_data_continues(settings, tmp_path):
    def make(model):
        return torch.optim.LBFGS([each for each in model.parameters() if each.requires_grad], lr=0.05, max_iter=3)

    uninterrupted = Training(single, make).keep(tmp_path, **settings)
    assert "module.weight/old_dirs" in uninterrupted[2]
    assert differing(Training(single, make, seed=2).resume(tmp_path), uninterrupted) == []


def test_several_optimizers_of_one_model_continue(tmp_path):
    trainings = []
    for seed in (1, 2):
        training = Training(single, lambda model: torch.optim.Adam(model.module.parameters(), lr=0.02), seed=seed)
        rest = [*training.model.second.parameters(), *training.model.tied.parameters()]
        training.others = {"second": torch.optim.SGD(rest, lr=0.1, momentum=0.9)}
        trainings.append(training)
    uninterrupted = trainings[0].keep(tmp_path, async_save=True)
    assert differing(trainings[1].resume(tmp_path), uninterrupted) == []


@pytest.mark.parametrize(("before", "after"), [(Around, single), (single, Around)])
def test_state_of_a_model_with_other_names_continues(before, after, tmp_path):
    def make(model):
        return torch.optim.Adam(trained_of(model), lr=0.02)

    uninterrupted = Training(after, make).keep(tmp_path / "a")
    Training(before, make).keep(tmp_path / "b")
    assert differing(Training(after, make, seed=2).resume(tmp_path / "b"), uninterrupted) == []


class Scaled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.rand(2))


class ScaledAround(Around):
    """With a parameter of its own that is not in its state dict, where one of the module in it has its name."""

    def __init__(self, inner):
        super().__init__(inner)
        self.scale = nn.Parameter(torch.rand(3))


def momenta(model, is_stepped):
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.9)
    for number, parameter in enumerate(parameters if is_stepped else [], start=1):
        parameter.grad = torch.full_like(parameter, number)
    optimizer.step()
    return optimizer, [optimizer.state[each].get("momentum_buffer") for each in parameters]


@pytest.mark.parametrize(
    ("make", "settings", "only"),
    [
        (lambda: Around(Scaled(Scaled(nn.Linear(2, 2)))), {}, None),
        (lambda: ScaledAround(Scaled(nn.Linear(2, 2))), {}, None),
        (lambda: nn.Sequential(nn.Linear(2, 2), Around(nn.Linear(2, 2))), {"model_names": ["0", "1"]}, "0"),
    ],
    ids=["names of others", "names of what is not saved", "names in what is not loaded"],
)
def test_names_of_a_state_dict_are_those_of_one_parameter(make, settings, only, tmp_path):
    model, again = make(), make()
    optimizer, expected = momenta(model, is_stepped=True)
    state = {"optimizer": optimizer}
    with BestKeeper(model, directory=tmp_path, metric_key="loss", training_state=state, **settings) as keeper:
        keeper.observe(1.0, update(1))
    fresh, _ = momenta(again, is_stepped=False)
    load(tmp_path, BEST, again, training_state={"optimizer": fresh}, only=only)
    found = [fresh.state[each]["momentum_buffer"] for each in again.parameters()]
    assert all(map(torch.equal, found, expected))


def test_hooks_of_the_optimizer_run(tmp_path):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    seen = []

    def note(_, state):
        state["param_groups"][0]["note"] = [1, "kept"]
        state["beside"] = {"rounds": 3}

    optimizer.register_state_dict_post_hook(note)
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(state["param_groups"][0]["note"]))
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(state["beside"]))
    states = {"optimizer": optimizer}
    with BestKeeper(model, directory=tmp_path, metric_key="loss", training_state=states) as keeper:
        keeper.observe(1.0, update(1))
    load(tmp_path, BEST, model, training_state=states)
    assert seen == [[1, "kept"], {"rounds": 3}]


class Own(torch.optim.Optimizer):
    def __init__(self, parameters, **options):
        super().__init__(parameters, {"rate": 0.1, **options})

    def step(self, closure=None):
        closure()
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["z"] = torch.full_like(parameter, 3.0)


class Wrapped(torch.optim.Optimizer):
    """As Accelerate wraps an optimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups, state, defaults = (
        property(lambda self, name=name: getattr(self.optimizer, name))
        for name in ("param_groups", "state", "defaults")
    )

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state)

    def step(self, closure=None):
        self.optimizer.step(closure)


ADAM, ADAMW = torch.optim.Adam, torch.optim.AdamW


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (torch.optim.SGD, ADAM, "'optimizer': it was saved from 'SGD', and is to be loaded into 'Adam'"),
        (ADAM, ADAMW, "it was saved from 'Adam', and is to be loaded into 'AdamW'"),
        (lambda them: Wrapped(ADAMW(them)), ADAM, "it was saved from 'AdamW', and is to be loaded into 'Adam'"),
        (torch.optim.LBFGS, lambda them: torch.optim.LBFGS(them[::-1]), "all parameters together, in their order"),
        (Own, lambda them: Own(them, more=1), "it was saved without the options 'more', which 'Own' needs"),
    ],
    ids=["other", "newer", "wrapped", "order", "own"],
)
def test_state_of_another_kind_of_optimizer_is_refused(before, after, message, tmp_path):
    Training(single, lambda model: before(trained_of(model))).keep(tmp_path)
    again = Training(single, lambda model: after(trained_of(model)), seed=2)
    untouched = again.everything()
    with pytest.raises(SnapshotError, match=message):
        load(tmp_path, BEST, again.model, training_state=again.state)
    assert again.everything() == untouched


def trained_of(model):
    return [each for each in model.parameters() if each.requires_grad]


class Derived(torch.optim.SGD):
    """An optimizer of the user's, which is one of torch."""


TENSOR = torch.tensor(0.25)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (lambda them: ADAM(them, lr=0.25), lambda them: Wrapped(ADAM(them, lr=0.5))),
        (lambda them: torch.optim.SGD(them, lr=0.25), lambda them: Derived(them, lr=0.5)),
        (lambda them: ADAM(them, lr=TENSOR), lambda them: ADAM(them, lr=0.5, foreach=True)),
        (lambda them: ADAM(them, lr=0.25), lambda them: ADAM(them, lr=TENSOR * 2, foreach=False)),
    ],
    ids=["wrapped", "derived", "to number", "to tensor"],
)
def test_state_comes_back_into_the_form_of_the_optimizer(before, after, tmp_path):
    Training(single, lambda model: before(trained_of(model))).keep(tmp_path)
    again = Training(single, lambda model: after(trained_of(model)), seed=2)
    kind = type(again.optimizer.param_groups[0]["lr"])
    again.resume(tmp_path)
    assert again.optimizer.param_groups[0]["lr"] == 0.25
    assert type(again.optimizer.param_groups[0]["lr"]) is kind


class Failing:
    def __init__(self, at):
        self.at = at

    def state_dict(self):
        if self.at == "save":
            raise ValueError("no state today")
        return {}

    def load_state_dict(self, _):
        if self.at == "load":
            raise ValueError("no, thank you")


def fail_on_rank_1(directory):
    """What each rank hears."""
    model = nn.Linear(1, 1)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    failing, fine = Failing("save" if dist.get_rank() else ""), Failing("")
    with pytest.raises(RankFailedError) as at_start:
        BestKeeper(model, directory=directory / "a", metric_key="loss", training_state={"it": failing}).start()
    with BestKeeper(model, directory=directory / "b", metric_key="loss", training_state={"it": fine}) as keeper:
        keeper.observe(2.0, update(1))
        fine.at = failing.at
        with pytest.raises(KeepBestError) as at_save:
            keeper.observe(1.0, update(2))
        fine.at = ""
        keeper.observe(0.5, update(3))
    with pytest.raises(RankFailedError) as at_load:
        load(directory / "b", BEST, model, training_state={"it": Failing("load" if dist.get_rank() else "")})
    return [str(each.value) for each in (at_start, at_save, at_load)]


def test_state_that_fails_on_one_rank_is_an_error_on_all(tmp_path):
    for at_start, at_save, at_load in run_ranks(fail_on_rank_1, 2, tmp_path):
        assert all("rank 1" in each and "no state today" in each for each in (at_start, at_save))
        assert "no, thank you" in at_load


class Stage(nn.Module):
    """A layer of a model whose name is its own."""

    def __init__(self, numbers, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleDict({str(number): nn.Linear(3, 3) for number in numbers})

    def forward(self, x):
        for layer in self.layers.values():
            x = torch.tanh(layer(x))
        return x


def trained(numbers, seed):
    """A stage, and an optimizer with one group for the weights and one for the biases."""
    stage = Stage(numbers, seed)
    parts = [
        {"params": [each for each in stage.parameters() if each.dim() == dim], "lr": lr}
        for dim, lr in ((2, 0.1), (1, 0.2))
    ]
    optimizer = torch.optim.Adam(parts, betas=(0.5, 0.9))
    stage(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return stage, optimizer


def state_of(stage, optimizer):
    names = {id(each): name for name, each in stage.named_parameters()}
    return {names[id(each)]: state["exp_avg"].tolist() for each, state in optimizer.state.items()}


def keep_stages(directory, settings):
    rank = dist.get_rank()
    stage, optimizer = trained([rank], seed=rank)
    states = {"optimizer": optimizer}
    with BestKeeper(stage, directory=directory, metric_key="loss", training_state=states, **settings) as keeper:
        keeper.observe(1.0, update(1))
    kept = state_of(stage, optimizer)
    optimizer.state.clear()
    load(directory, BEST, stage, training_state=states)
    assert state_of(stage, optimizer) == kept
    return kept


@pytest.mark.parametrize("settings", SETTINGS[1::3], ids=str)
def test_optimizers_of_stages_are_one(settings, tmp_path):
    kept = run_ranks(keep_stages, 2, tmp_path, settings)
    whole, optimizer = trained([0, 1], seed=9)
    load(tmp_path, BEST, whole, training_state={"optimizer": optimizer})
    assert state_of(whole, optimizer) == kept[0] | kept[1]
    other, less = trained([0, 1], seed=9)
    less = torch.optim.Adam(other.layers["0"].parameters())
    with pytest.raises(SnapshotError, match=r"the optimizer does not have|were saved in group"):
        load(tmp_path, BEST, other, training_state={"optimizer": less})


def make_zero(directory):
    model = ddp(nn.Linear(2, 2))
    zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ConfigError, match="is a ZeroRedundancyOptimizer, of whose state each rank has a part"):
        BestKeeper(model, directory=directory, metric_key="loss", training_state={"optimizer": zero})


def test_optimizer_that_shares_itself_out_is_refused(tmp_path):
    run_ranks(make_zero, 2, tmp_path)


def test_lazy_model_wants_its_weights_first(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = ADAM(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    with BestKeeper(model, directory=tmp_path, metric_key="loss", training_state={"it": optimizer}) as keeper:
        keeper.observe(1.0, update(1))
    lazy = nn.LazyLinear(2)
    states = {"it": ADAM(lazy.parameters())}
    with pytest.raises(SnapshotError, match=r"'it': .* not initialized yet.* Load the weights first, without"):
        load(tmp_path, BEST, lazy, training_state=states)
    load(tmp_path, BEST, lazy)
    load(tmp_path, BEST, lazy, training_state=states)
    assert state_of(lazy, states["it"]) == state_of(model, optimizer)


def two_layers(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    return model, ADAM(model.parameters())


@pytest.mark.parametrize("kind", ["torch", "dcp"])
def test_state_of_untied_weights_is_not_mixed_where_tied(kind, tmp_path):
    model, optimizer = two_layers(1)
    model(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()
    model[2].load_state_dict(model[0].state_dict())  # the weights themselves could be tied
    with BestKeeper(
        model, directory=tmp_path, metric_key="loss", training_state={"it": optimizer}, format=kind
    ) as keeper:
        keeper.observe(2.0, update(1))
        tied, _ = two_layers(2)
        tied[2].weight = tied[0].weight
        states = {"it": ADAM(tied.parameters())}
        before = tied[0].weight.tolist()
        with pytest.raises(SnapshotError, match=r"0.weight/exp_avg and 2.weight/exp_avg were saved with different"):
            load(tmp_path, BEST, tied, training_state=states)
        assert tied[0].weight.tolist() == before
        for key, value in optimizer.state[model[0].weight].items():
            optimizer.state[model[2].weight][key] = value.clone()
        keeper.observe(1.0, update(2))
    load(tmp_path, BEST, tied, training_state=states)
    assert state_of(tied, states["it"])["0.weight"] == state_of(model, optimizer)["0.weight"]


def test_strange_data_in_an_optimizer_is_named_as_such(tmp_path):
    model, optimizer = two_layers(1)
    optimizer.state[model[0].weight]["odd"] = object()
    with pytest.raises(ConfigError, match=r"is a object at .* Return one of these from state_dict\(\) of the training"):
        BestKeeper(model, directory=tmp_path, metric_key="loss", training_state={"it": optimizer}).start()

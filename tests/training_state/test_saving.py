"""What is saved of a training state, what it costs, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn

from keepbest import BestKeeper, PerRank, load
from keepbest.errors import ConfigError, DesyncError, SnapshotError
from keepbest.export import export
from keepbest.formats.plain_load import load_plain
from keepbest.run.verify import verify
from tests.kit.files import SteppedFiles, before
from tests.kit.pool import run_ranks
from tests.kit.runs import update
from tests.kit.seams import use
from tests.kit.strategies import ddp, single
from tests.saving.gate import Gate
from tests.training_state.loop import BEST, Training, differing, whole
from tests.training_state.test_continue import OPTIMIZERS

SGD, ADAMW = OPTIMIZERS["sgd"], OPTIMIZERS["adamw foreach"]


class Counter:
    """A training state of plain data, or of what a test gives it."""

    def __init__(self, value=0):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state_dict):
        self.value = state_dict["value"]


def keeper_of(training, directory, **settings):
    given = {"metric_key": "loss", "training_state": training.state, **settings}
    return BestKeeper(training.model, directory=directory, **given)


def test_files_are_what_torch_reads(tmp_path):
    training = Training(single, SGD)
    training.keep(tmp_path, format="safetensors")
    folder = tmp_path / "checkpoints" / BEST
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "optimizer.pt", "snapshot.json"}
    stored = torch.load(folder / "optimizer.pt", weights_only=True)
    [groups] = [value for key, value in stored.items() if key.startswith("param_groups.")]
    assert groups["param_groups"][0]["lr"] == 0.1
    assert groups["param_groups"][0]["params"] == [name for name, _ in training.model.named_parameters()]
    trained = {name for name, each in training.model.named_parameters() if each.requires_grad}
    assert stored.keys() - {key for key in stored if "/" not in key} == {f"{name}/momentum_buffer" for name in trained}
    assert json.loads((folder / "snapshot.json").read_bytes())["training_state"] == ["optimizer"]
    assert verify(tmp_path) == []


@pytest.mark.parametrize("kind", ["torch", "dcp"])
def test_export_and_load_of_weights_leave_the_state_alone(kind, tmp_path):
    training = Training(single, SGD)
    training.keep(tmp_path, format=kind)
    export(tmp_path, BEST, tmp_path / "out.pt")
    other = Training(single, SGD, seed=2)
    for path in tmp_path.glob("checkpoints/snapshots/*/optimizer*/*.distcp"):
        path.write_bytes(b"damaged, and not read")
    loaded = load(tmp_path, BEST, other.model)
    assert torch.load(tmp_path / "out.pt", weights_only=True).keys() == other.model.state_dict().keys()
    assert (loaded.parts, loaded.training_state, loaded.unused_training_state) == (("model",), (), ("optimizer",))
    assert other.optimizer.state_dict()["state"] == {}


def test_changes_after_observe_are_not_in_the_snapshot(tmp_path):
    gate, counter = Gate("optimizer.pt"), Counter([torch.zeros(2)])
    training = Training(single, ADAMW, others={"counter": lambda _: counter})
    with use(tmp_path, files=SteppedFiles(before(gate))), keeper_of(training, tmp_path, async_save=True) as keeper:
        training.run([1])
        keeper.observe(1.0, update(1))
        expected = training.everything()
        assert gate.is_reached.wait(60)
        training.run([2, 3])
        counter.value[0] += 1
        training.optimizer.param_groups[0]["lr"] = 9.0
        gate.is_open.set()
    again = Training(single, ADAMW, seed=2, others={"counter": lambda _: Counter()})
    load(tmp_path, BEST, again.model, training_state=again.state)
    assert again.everything() == expected


def count_exchanges(directory, wrap, settings):
    """What each best costs while the state of the optimizer comes, and what one without an optimizer costs."""
    found = {}
    for name in ("with", "without"):
        training = Training(wrap, ADAMW)
        states = training.state if name == "with" else None
        with keeper_of(training, directory / name, training_state=states, **settings) as keeper:
            costs = found[name] = []
            for number in range(1, 5):
                if number > 1:
                    training.step(number)
                before_it = keeper._ranks._control.round
                keeper.observe(-number, update(number))
                costs.append(keeper._ranks._control.round - before_it)
    return found


@pytest.mark.parametrize("settings", [{}, {"async_save": True}, {"format": "dcp", "async_save": True}], ids=str)
def test_best_with_an_optimizer_costs_no_more_exchanges(settings, tmp_path):
    for found in run_ranks(count_exchanges, 2, tmp_path, ddp, settings):
        assert found["with"][0] == found["without"][0]
        assert found["with"][1] > found["without"][1]  # the state has come, so the ranks compare what there is
        assert found["with"][2:] == found["without"][2:]


def test_keepers_share_a_snapshot_of_one_training_state_alone(tmp_path):
    training = Training(single, SGD)
    training.step(1)
    second = torch.optim.SGD(training.model.parameters(), lr=0.5)
    states = [training.state, training.state, {"other": training.optimizer}, None, {"optimizer": second}]
    keepers = [
        BestKeeper(training.model, directory=tmp_path, metric_key=f"loss/{number}", training_state=state)
        for number, state in enumerate(states)
    ]
    for keeper in keepers:
        keeper.start()
    for keeper in keepers:
        keeper.observe(1.0, update(1))
    assert len({keeper.best_path for keeper in keepers}) == 4
    assert keepers[0].best_path == keepers[1].best_path
    keepers[0].observe(0.5, update(2))
    training.optimizer.state[training.model.module.weight]["momentum_buffer"].add_(1.0)
    keepers[1].observe(0.5, update(2))
    assert keepers[0].best_path != keepers[1].best_path
    for keeper in keepers:
        keeper.close()


class Strange(NamedTuple):
    x: int


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([], "must be a mapping"),
        ({"model": 1}, "'model' would have the file of 'model'"),
        ({"Model": 1}, "'Model' would have the file of 'model'"),
        ({"a/b": 1}, "'a/b' is no name"),
        ({"": 1}, "'' is no name"),
        ({"a": 1}, "'a' is a int, which lacks state_dict or load_state_dict"),
        ({"a": nn.Linear(1, 1)}, "'a' is a module"),
        ({"a": torch.optim.SGD}, "'a' is a type, which lacks"),
        ({"a": Counter([{"x": Strange(1)}])}, r"'state of a' .* a Strange at \['value'\]\[0\]\['x'\]"),
        (
            {"a": torch.optim.SGD(nn.Linear(1, 1).parameters())},
            "'a': parameter 0 of group 0 .* shape \\[1, 1\\], is no",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused_at_start(state, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        BestKeeper(nn.Linear(2, 2), directory=tmp_path, metric_key="loss", training_state=state).start()
    assert not (tmp_path / "checkpoints" / "snapshots").exists()


def keep_unlike_states(directory):
    """What the ranks hear whose optimizers are not alike."""
    found = []
    training = Training(ddp, SGD)
    training.step(1)
    weight = training.model.module.module.weight
    state, right = training.optimizer.state, training.optimizer.state[weight]["momentum_buffer"]
    for number, wrong in enumerate(({}, {"momentum_buffer": right.double()}, {"momentum_buffer": right[:2]})):
        state[weight] = wrong if dist.get_rank() == 1 else {"momentum_buffer": right}
        with pytest.raises(ConfigError) as caught:
            keeper_of(training, directory / str(number)).start()
        found.append(str(caught.value))
    names = {"a": training.optimizer} if dist.get_rank() else {"b": training.optimizer}
    with pytest.raises(DesyncError, match="training_state"):
        keeper_of(training, directory, training_state=names)
    return found


def test_states_that_differ_between_ranks_are_refused(tmp_path):
    for lacking, dtype, shape in run_ranks(keep_unlike_states, 2, tmp_path):
        name = "'module.weight/momentum_buffer of optimizer'"
        assert f"{name} is on rank 0, and not on rank 1, whose optimizers have the same parameters" in lacking
        assert all(f"different things under the name {name}" in each for each in (dtype, shape))
        assert "a state of shape [2, 5], float32, strided on rank 1" in shape


def keep_values_apart(directory, settings):
    """What the ranks hear whose momentum is of their own gradients, while their weights are equal, as in local SGD."""
    training = Training(ddp, SGD)
    with keeper_of(training, directory, **settings) as keeper:
        training.step(1)
        keeper.observe(3.0, update(1))
        for state in training.optimizer.state.values():
            state["momentum_buffer"] += dist.get_rank()
        with pytest.raises(ConfigError) as caught:
            keeper.observe(2.0, update(2))
        for state in training.optimizer.state.values():
            state["momentum_buffer"].zero_()
        return str(caught.value), keeper.observe(1.0, update(3)).is_new_best


@pytest.mark.parametrize("settings", [{"format": "torch"}, {"format": "dcp", "async_save": True}])
def test_values_of_a_state_that_differ_are_refused(settings, tmp_path):
    for message, is_kept_later in run_ranks(keep_values_apart, 2, tmp_path, settings):
        assert "ranks 0, 1 differ in what must be equal: 'momentum_buffer' of the optimizer 'optimizer' for" in message
        assert is_kept_later


def load_what_does_not_fit(directory):
    """What the ranks hear of states that do not fit. Rank 1 alone has other objects."""
    Training(ddp, SGD, others={"counter": lambda _: Counter(3)}).keep(directory)
    found = []
    is_wrong = dist.get_rank() == 1
    for case in ("absent", "missing", "new", "apart", "kind", "strange"):
        other = Training(ddp, SGD, seed=2)
        before_it = other.everything()
        parameters = list(other.model.parameters())
        wrong = {
            "absent": {"scheduler": Counter()},
            "missing": {"optimizer": torch.optim.SGD(parameters[1:], lr=1)},
            "new": {"optimizer": torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=1)},
            "apart": {"optimizer": Counter()},
            "kind": {"counter": other.optimizer},
            "strange": {"optimizer": torch.optim.SGD(nn.Linear(1, 1).parameters())},
        }[case]
        right = {name: other.optimizer if name == "optimizer" else Counter() for name in wrong}
        with pytest.raises((SnapshotError, ConfigError)) as caught:
            load(directory, BEST, other.model, training_state=wrong if is_wrong or case == "absent" else right)
        assert differing({0: other.everything()}, {0: before_it}) == []
        found.append(str(caught.value))
    return found


def test_state_that_does_not_fit_is_refused_before_any_load(tmp_path):
    first, second = run_ranks(load_what_does_not_fit, 2, tmp_path)
    assert first == second
    absent, missing, new, apart, kind, strange = first
    assert "has no training state 'scheduler'; it has: optimizer, counter" in absent
    assert "saved with module.weight, which the optimizer does not have" in missing
    assert "group 0 has module.weight, which were saved in group 0, together with others" in new
    assert "'optimizer': it was saved from an optimizer" in apart
    assert "'counter': it was not saved from an optimizer" in kind
    assert "parameter 0 of group 0 of the optimizer, of shape [1, 1], is no parameter of the model" in strange


def test_state_of_the_top_k_is_kept_with_each(tmp_path):
    training = Training(single, ADAMW)
    with keeper_of(training, tmp_path, keep_top_k=2) as keeper:
        found = training.run([1, 2, 3], keeper)
    for place, number in ((1, 2), (2, 3)):
        again = Training(single, ADAMW, seed=2)
        load(tmp_path, f"{BEST}.top={place}", again.model, training_state=again.state)
        assert again.everything() == found[number]


def test_state_follows_to_the_remote_copy_and_back(tmp_path):
    training = Training(single, ADAMW, others={"counter": lambda _: Counter(4)})
    uninterrupted = training.keep(tmp_path / "run", remote=(tmp_path / "copy").as_uri())
    again = Training(single, ADAMW, seed=2, others={"counter": lambda _: Counter()})
    assert differing(again.resume((tmp_path / "copy").as_uri()), uninterrupted) == []
    assert whole(again.others["counter"].state_dict()) == {"value": 4}


def files_at(tensors):
    """The files that tensors lie in."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if ".pt" in line]
    mapped = [(*(int(end, 16) for end in line[0].split("-")), line[-1]) for line in lines]
    return {file for each in tensors for start, end, file in mapped if start <= each.data_ptr() < end}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what is mapped")
def test_what_is_loaded_does_not_lie_in_the_file(tmp_path):
    training = Training(single, ADAMW, others={"counter": lambda _: Counter([torch.zeros(2)])})
    training.keep(tmp_path)
    load(tmp_path, BEST, training.model, training_state=training.state)
    tensors = [value for state in training.optimizer.state.values() for value in state.values()]
    assert files_at([*tensors, training.others["counter"].value[0]]) == set()
    stored = load_plain((tmp_path / "checkpoints" / BEST).resolve() / "optimizer.pt")
    assert files_at(value for key, value in stored.items() if "/" in key) != set()  # as it is read


class Weights:
    """Its state is one tensor."""

    def __init__(self, value):
        self.value = torch.full((3,), value)

    def state_dict(self):
        return self.value

    def load_state_dict(self, value):
        self.value = value


@pytest.mark.parametrize("mark", [lambda thing: thing, PerRank])
@pytest.mark.parametrize("file_format", ["torch", "safetensors", "dcp"])
def test_state_may_be_one_tensor(file_format, mark, tmp_path):
    model = nn.Linear(1, 1)
    states = {"sampler": mark(Weights(2.0))}
    with BestKeeper(model, directory=tmp_path, metric_key="loss", training_state=states, format=file_format) as keeper:
        keeper.observe(1.0, update(1))
    load(tmp_path, BEST, model, training_state={"sampler": mark(loaded := Weights(0.0))})
    assert loaded.value.tolist() == [2.0] * 3

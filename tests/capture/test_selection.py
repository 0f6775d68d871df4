"""What is saved: the parts that were named, with or without what is frozen, and nothing lost silently."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from keepbest import BestKeeper, load
from keepbest.errors import ConfigError, SnapshotError
from keepbest.modules.parts import select_parts
from keepbest.ranks import Ranks
from tests.kit.capture import gather
from tests.kit.models import Around, Bare, Composite, Odd, WithState, filled, nested, odd, same, same_bits
from tests.kit.pool import run_ranks
from tests.kit.runs import update
from tests.kit.strategies import FAMILIES, WRAPS, compiled, fits, whole_weights

REF = "best_model.loss"


def names(model, model_names=None):
    return [part.name for part in select_parts(model, model_names)]


def test_composites_are_saved_by_submodel_and_others_whole():
    assert names(Odd()) == ["model"]
    assert names(nested()) == ["autoencoder.encoder", "autoencoder.decoder", "head", "model"]
    assert names(nested(), ["autoencoder"]) == ["autoencoder.encoder", "autoencoder.decoder"]
    assert names(nested(), ["head", "autoencoder.encoder"]) == ["head", "autoencoder.encoder"]
    assert names(nested(), ["autoencoder.encoder.norm"]) == ["autoencoder.encoder.norm"]
    assert names(Odd(), ["module", "tied.first"]) == ["module", "tied.first"]
    assert names(compiled(nn.DataParallel(Odd())), ["module"]) == ["module"]


@pytest.mark.parametrize(
    ("model_names", "message"),
    [
        (["encoder"], "no submodel 'encoder'; there are: autoencoder, head"),
        (["autoencoder.head"], "no submodel 'autoencoder.head'"),
        ([""], "no submodel ''"),
        ([], "model_names is empty"),
        (["head", "head"], "head would be saved more than once"),
        (["autoencoder", "autoencoder.encoder"], "autoencoder.encoder would be saved more than once"),
    ],
)
def test_names_that_cannot_be_right_are_refused(model_names, message):
    with pytest.raises(ConfigError, match=message):
        select_parts(nested(), model_names)


def test_error_says_how_many_names_it_leaves_out():
    layers = nn.Sequential(*(nn.Identity() for _ in range(45)))
    with pytest.raises(ConfigError, match=r"no submodel 'head'; there are: 0, 1, 10, .* and 5 more$"):
        select_parts(layers, ["head"])
    with pytest.raises(ConfigError, match=r"no submodel '40'; there are: 0, 1, 10, .*, 9$"):
        select_parts(layers[:40], ["40"])


def test_names_that_differ_only_in_case_are_refused():
    with pytest.raises(ConfigError, match="upper and lower case are one name"):
        select_parts(Bare({"head": nn.Linear(1, 1), "Head": nn.Linear(1, 1)}))


def frozen(seed):
    """A composite with a frozen submodel, and a half frozen one with buffers."""
    model = Composite({"encoder": Odd(), "frozen": Odd(), "head": nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))})
    model.frozen.requires_grad_(False)
    model.encoder.module.requires_grad_(False)
    model.encoder.tied.requires_grad_(False)
    return filled(model, seed)


def without(state, *prefixes):
    return {key: value.detach().clone() for key, value in state.items() if not key.startswith(prefixes)}


HALF = ["module.bias", "module.weight", "tied.first.weight", "tied.second.weight"]


def save_without_frozen_weights(family, directory):
    """Faults, for the strategies of a family that let a unit be half frozen."""
    ranks, faults = Ranks.connect(), []
    for wrap in [wrap for wrap in FAMILIES[family] if fits(wrap, ranks.world_size)]:
        model, reference = WRAPS[wrap](frozen(0)), frozen(0)
        weights = gather(model, save_frozen_weights=False)
        expected = {
            "encoder": without(reference.encoder.state_dict(), "module", "tied"),
            "head": without(reference.head.state_dict()),
            "model": {"scale": reference.scale.detach()},
        }
        wanted = expected if ranks.is_main else {}
        if weights.files.keys() != wanted.keys() or not all(same(weights.files[name], wanted[name]) for name in wanted):
            faults.append((wrap, {name: list(state) for name, state in weights.files.items()}))
        left_out = {"encoder": HALF, "frozen": sorted(reference.frozen.state_dict())}
        if ranks.is_main and weights.left_out != left_out:
            faults.append((wrap, weights.left_out))
        run = directory / wrap
        with BestKeeper(model, directory=run, metric_key="loss", save_frozen_weights=False) as keeper:
            keeper.observe(1.0, update(1))
        target, other = WRAPS[wrap](frozen(1)), frozen(1)
        loaded = load(run, REF, target)
        for name, state in expected.items():
            (other if name == "model" else other.get_submodule(name)).load_state_dict(state, strict=False)
        found, mixed = whole_weights(target), whole_weights(other)
        if wrap == "ddp" and not ranks.is_main:
            continue  # what was not saved is as it was: buffers that are not those of rank 0
        if loaded.parts != ("encoder", "head", "model") or not all(map(same_bits, found, mixed)):
            faults.append((wrap, loaded))
    return faults


@pytest.mark.parametrize(("family", "world_size"), [("replicated", 1), ("replicated", 2), ("fsdp1", 2), ("fsdp2", 3)])
def test_only_frozen_weights_may_be_left_out_and_missing(family, world_size, tmp_path):
    assert run_ranks(save_without_frozen_weights, world_size, family, tmp_path) == [[]] * world_size


def save_without_a_frozen_flat_unit():
    model = nn.Sequential(Odd(), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    filled(model, 0)
    expected = {"1.weight": model[1].weight.detach().clone(), "1.bias": model[1].bias.detach().clone()}
    expected |= {f"0.{key}": value.clone() for key, value in model[0].named_buffers() if key != "scratch"}
    for name in ("0", "1"):
        model.set_submodule(name, WRAPS["fsdp1_flat"](model.get_submodule(name)))
    ranks = Ranks.connect()
    weights = gather(model, save_frozen_weights=False)
    return not ranks.is_main or same(weights.files["model"], expected)


def test_flat_fsdp1_unit_is_frozen_as_a_whole():
    assert run_ranks(save_without_a_frozen_flat_unit, 2) == [True, True]


def test_frozen_weights_count_when_saved_and_all_is_an_error(tmp_path):
    model = odd(0)
    keeper = BestKeeper(model, directory=tmp_path, metric_key="loss", save_frozen_weights=False)
    with keeper:
        model.module.requires_grad_(False)
        keeper.observe(2.0, update(1))
        first = torch.load(keeper.best_path / "model.pt", weights_only=True)
        assert not any(key.startswith("module.") for key in first)
        model.module.requires_grad_(True)
        keeper.observe(1.0, update(2))
        assert torch.load(keeper.best_path / "model.pt", weights_only=True).keys() == model.state_dict().keys()
        model.requires_grad_(False)
        with pytest.raises(ConfigError, match="nothing to save"):
            keeper.observe(0.5, update(3))
        assert keeper.best_metric_value == 1.0


def test_frozen_weights_are_left_out_under_other_names(tmp_path):
    model = Around(odd(0))
    model.inner.module.requires_grad_(False)
    with BestKeeper(model, directory=tmp_path, metric_key="loss", save_frozen_weights=False) as keeper:
        keeper.observe(1.0, update(1))
    kept = torch.load(keeper.best_path / "model.pt", weights_only=True)
    assert kept.keys() == {key for key in odd(0).state_dict() if not key.startswith("module.")}
    assert load(tmp_path, REF, odd(1)).left_alone == load(tmp_path, REF, Around(odd(1))).left_alone != ()


@pytest.mark.parametrize("frozen", ["", "inner."])
def test_frozen_weights_are_known_where_others_have_their_names(frozen, tmp_path):
    model = Around(nn.Linear(2, 2))
    model.inner.inner = nn.Linear(2, 2)  # its names in the model are "inner.inner.weight", and here "inner.weight"
    model.get_submodule(f"inner.{frozen}".rstrip(".")).weight.requires_grad_(False)
    with BestKeeper(model, directory=tmp_path, metric_key="loss", save_frozen_weights=False) as keeper:
        keeper.observe(1.0, update(1))
    kept = torch.load(keeper.best_path / "model.pt", weights_only=True)
    assert kept.keys() == {"weight", "bias", "inner.weight", "inner.bias"} - {f"{frozen}weight"}


class Adding(nn.Linear):
    """With a buffer that is a parameter for torch, in a state dict that adds another one."""

    def __init__(self):
        super().__init__(2, 2)
        self.register_buffer("fixed", nn.Parameter(torch.ones(2), requires_grad=False))

    def state_dict(self, *arguments, **named):
        made = nn.Parameter(torch.zeros(2), requires_grad=False)
        return {**super().state_dict(*arguments, **named), "made": made}


@pytest.mark.parametrize("wrap", [lambda model: model, Around], ids=["plain", "around"])
def test_parameters_that_are_none_of_the_model_are_not_frozen(wrap, tmp_path):
    with BestKeeper(wrap(Adding()), directory=tmp_path, metric_key="loss", save_frozen_weights=False) as keeper:
        keeper.observe(1.0, update(1))
    kept = torch.load(keeper.best_path / "model.pt", weights_only=True)
    assert kept.keys() == {"weight", "bias", "fixed", "made"}


def test_other_keys_than_the_frozen_ones_may_not_be_missing(tmp_path):
    model = odd(0)
    model.module.requires_grad_(False)
    with BestKeeper(model, directory=tmp_path, metric_key="loss", save_frozen_weights=False) as keeper:
        keeper.observe(1.0, update(1))
    bigger = odd(1)
    bigger.extra = nn.Linear(1, 1)
    with pytest.raises(SnapshotError, match=r"the snapshot lacks extra.bias, extra.weight\. Nothing"):
        load(tmp_path, REF, bigger)


class Named(NamedTuple):
    number: int


STATE = {"steps": 10**30, 7: ("a", None, [True]), "table": torch.arange(3), "more": (b"\xff", 1j, {2}, -0.0, "ü")}


def load_extra_state(directory):
    model = WithState({})
    load(directory, REF, model)
    return repr(model.state)


def test_extra_state_of_plain_data_is_restored_on_every_rank(tmp_path):
    with BestKeeper(WithState(STATE), directory=tmp_path, metric_key="loss") as keeper:
        keeper.observe(1.0, update(1))
    assert load_extra_state(tmp_path) == repr(STATE)
    assert run_ranks(load_extra_state, 2, tmp_path) == [repr(STATE)] * 2


@pytest.mark.parametrize("file_format", ["torch", "safetensors", "dcp"])
@pytest.mark.parametrize(
    "before", [torch.zeros(0), torch.zeros(3, dtype=torch.int16), None], ids=["empty", "int", "None"]
)
def test_extra_state_that_is_a_tensor_comes_back_in_any_shape(before, file_format, tmp_path):
    with BestKeeper(WithState(torch.arange(3.0)), directory=tmp_path, metric_key="loss", format=file_format) as keeper:
        keeper.observe(1.0, update(1))
    load(tmp_path, REF, model := WithState(before))
    assert torch.equal(model.state, torch.arange(3.0))


@pytest.mark.parametrize("state", [len, [{"a": (len,)}], Named(1), np.float64(1.0), {1: len}], ids=repr)
def test_extra_state_that_could_not_be_read_again_is_refused(state, tmp_path):
    keeper = BestKeeper(WithState(state), directory=tmp_path / "run", metric_key="loss")
    with pytest.raises(ConfigError, match="'_extra_state' in the state dict is a"):
        keeper.start()
    assert not (tmp_path / "run").exists()


def test_weights_on_the_meta_device_are_refused(tmp_path):
    keeper = BestKeeper(nn.Linear(1, 1, device="meta"), directory=tmp_path, metric_key="loss")
    with pytest.raises(ConfigError, match="'weight' is on the meta device"):
        keeper.start()


def test_view_is_saved_without_the_storage_that_it_looks_into(tmp_path):
    model = nn.Linear(1, 1)
    model.weight = nn.Parameter(torch.zeros(1_000_000)[:1].view(1, 1))
    with BestKeeper(model, directory=tmp_path, metric_key="loss") as keeper:
        keeper.observe(1.0, update(1))
    assert (keeper.best_path / "model.pt").stat().st_size < 10_000


def save_tied_weights(wrap, directory):
    with BestKeeper(WRAPS[wrap](odd(0)), directory=directory, metric_key="loss") as keeper:
        keeper.observe(1.0, update(1))
    state = torch.load(keeper.best_path / "model.pt", weights_only=True)
    return state["tied.first.weight"].data_ptr() == state["tied.second.weight"].data_ptr()


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2", "tensor_parallel"])
def test_tied_weights_are_moved_and_written_once(wrap, tmp_path):
    assert run_ranks(save_tied_weights, 2, wrap, tmp_path) == [True, True]

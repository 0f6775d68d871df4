"""Plain names: only torch's wrappers are taken out of them, a module keeps each of its names, and no weight is lost."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.optim.swa_utils import AveragedModel

from keepbest import BestKeeper, load
from keepbest.errors import ConfigError, SnapshotError
from keepbest.modules.parts import select_parts
from keepbest.modules.sources import list_sources, plain_state_dict
from keepbest.modules.wrappers import PlainNames
from tests.kit.calls import count_calls
from tests.kit.capture import gather
from tests.kit.runs import update
from tests.kit.strategies import compiled

BEST = "best_model.loss"
FORMATS = pytest.mark.parametrize("file_format", ["torch", "safetensors", "dcp"])


def unwrapped(module):
    return module


WRAPPERS = {"plain": unwrapped, "compiled": compiled, "checkpointed": checkpoint_wrapper, "offloaded": offload_wrapper}


class Shared(nn.Module):
    """A submodule under two names."""

    def __init__(self, seed=0, wrap=unwrapped):
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = self.target = wrap(nn.Linear(2, 2))
        self.head = nn.Linear(2, 1)


def keep(model, directory, **settings):
    with BestKeeper(model, directory=directory, metric_key="loss", **settings) as keeper:
        keeper.observe(1.0, update(1))
    return keeper.best_path


@FORMATS
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_submodule_with_two_names_has_both_and_loads(wrapper, file_format, tmp_path):
    wrap = WRAPPERS[wrapper]
    model, plain = Shared(0, wrap), Shared(0)
    assert gather(model).files["model"].keys() == plain.state_dict().keys()
    keep(model, tmp_path, format=file_format)
    for target in (Shared(1), Shared(1, wrap)):
        load(tmp_path, BEST, target)
        assert all(map(torch.equal, target.parameters(), plain.parameters()))


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ["encoder", "target"])
def test_submodule_is_found_under_each_of_its_names(name, wrapper, tmp_path):
    keep(Shared(0, WRAPPERS[wrapper]), tmp_path, model_names=[name])
    load(tmp_path, BEST, target := Shared(1))
    assert torch.equal(target.encoder.weight, Shared(0).encoder.weight)
    with pytest.raises(ConfigError, match="there are: encoder, head, target"):
        select_parts(Shared(), ["targte"])


class Named(nn.Module):
    """A user's own module, with weights beside a child that has the name of what a wrapper wraps."""

    def __init__(self, name, value):
        super().__init__()
        self.add_module(name, nn.Linear(1, 1))
        self.weight = nn.Parameter(torch.zeros(1, 1))
        for parameter in self.parameters():
            nn.init.constant_(parameter, value)


@FORMATS
@pytest.mark.parametrize("wrap", [unwrapped, compiled, AveragedModel])
@pytest.mark.parametrize("name", ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_child_that_is_named_like_a_wrappers_keeps_its_name(name, wrap, file_format, tmp_path):
    model = wrap(Named(name, 7.0))
    assert gather(model).files["model"].keys() == Named(name, 0.0).state_dict().keys() == {
        "weight", f"{name}.weight", f"{name}.bias",
    }  # fmt: skip
    keep(model, tmp_path, format=file_format)
    for target in (Named(name, 0.0), wrap(Named(name, 0.0))):
        load(tmp_path, BEST, target)
        assert [parameter.item() for parameter in target.parameters()] == [7.0] * 3


class Decayed(AveragedModel):
    """A user's own kind of average, with a buffer of its own."""

    def __init__(self, model, decay):
        super().__init__(model)
        self.register_buffer("decay", torch.tensor(decay))


@FORMATS
def test_torchscript_is_kept_and_loaded(file_format, tmp_path):
    batch = torch.ones(1, 2)
    model, other = (
        torch.jit.trace(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))), batch) for _ in range(2)
    )
    with BestKeeper(
        model, directory=tmp_path, metric_key="loss", format=file_format, model_names=["0", "1.0"]
    ) as keeper:
        keeper.observe(1.0, update(1))
    load(tmp_path, BEST, other)
    assert torch.equal(other(batch), model(batch))


@FORMATS
def test_weight_of_a_wrapper_itself_is_kept_and_loaded(file_format, tmp_path):
    keep(Decayed(nn.Linear(1, 1), 0.5), tmp_path, format=file_format)
    load(tmp_path, BEST, model := Decayed(nn.Linear(1, 1), 0.1))
    assert model.decay == 0.5


def test_keys_that_fall_together_are_refused_at_the_start(tmp_path):
    inner = nn.Linear(1, 1)
    inner.register_buffer("decay", torch.tensor(0.1))
    model = nn.ModuleDict({"net": compiled(Decayed(inner, 0.5))})
    with pytest.raises(ConfigError, match=r"'net\.decay' and 'net\.module\.decay' .* both be saved as 'net\.decay'"):
        keep(model, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_keys_that_fall_together_later_are_refused_by_name():
    model = Decayed(nn.Linear(1, 1), 0.5)
    model.module.register_state_dict_post_hook(
        lambda _module, state, prefix, _metadata: state.update({f"{prefix}decay": torch.zeros(1)})
    )
    [source] = list_sources(model, select_parts(model), save_frozen_weights=True)
    with pytest.raises(SnapshotError, match=r"'decay' and 'module\.decay' of the model would both be saved"):
        plain_state_dict(source)


def test_key_of_the_state_dict_follows_from_the_plain_key():
    model = AveragedModel(compiled(nn.Sequential(checkpoint_wrapper(Shared(0, compiled)), nn.BatchNorm1d(1))))
    names = PlainNames(model)
    for key in model.state_dict().keys() - {"n_averaged"}:
        assert names.key(names.plain(key)) == key
    assert (
        names.plain_state(model.state_dict()).keys() == nn.Sequential(Shared(), nn.BatchNorm1d(1)).state_dict().keys()
    )


@pytest.mark.parametrize("save_frozen_weights", [True, False])
def test_work_to_gather_a_model_is_linear_in_its_weights(save_frozen_weights):
    def work(size):
        model = compiled(nn.ModuleList([nn.Linear(1, 1) for _ in range(size)]))
        return count_calls(lambda: gather(model, save_frozen_weights=save_frozen_weights))

    assert work(400) < 5 * work(100)

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from keepbest.errors import ConfigError
from keepbest.models import CompositeModel
from keepbest.training.strategy import build_optimizers, place, training_device
from tests.kit import toys
from tests.kit.pool import run_ranks


class Pair(CompositeModel):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__({"first": first, "second": second})

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        return {"output": self.second(self.first(batch))}

    def losses(self, outputs: dict[str, Tensor], batch: Tensor) -> dict[str, Tensor]:
        return {"total": outputs["output"].square().mean(1)}


@pytest.mark.parametrize(
    ("backends", "device"),
    [
        ("cpu:gloo,cuda:nccl", "cuda:3"),  # also what torch chooses by itself
        ("cuda:nccl", "cuda:3"),
        ("cpu:gloo,cuda:gloo", "cpu"),  # of "gloo"
        ("cpu:gloo", "cpu"),
        (None, "cuda:3"),
    ],
)
def test_device_is_the_one_that_the_process_group_uses(backends, device, monkeypatch):
    # There is no GPU here, and no torch that has NCCL.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: backends is not None)
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: backends)
    assert training_device() == torch.device(device)


def test_one_factory_serves_all_submodels():
    model = toys.auto_encoder()
    optimizers = build_optimizers(model, toys.ADAM)
    assert list(optimizers) == ["encoder", "decoder"]
    assert optimizers["decoder"].param_groups[0]["params"] == list(model.decoder.parameters())


def test_nested_submodels_have_dotted_names():
    model = Pair(toys.auto_encoder(), nn.Linear(5, 5))
    factories = {"first.encoder": toys.ADAM, "first.decoder": toys.MOMENTUM, "second": toys.ADAM}
    assert list(build_optimizers(model, factories)) == ["first.encoder", "first.decoder", "second"]


@pytest.mark.parametrize(
    ("factories", "message"),
    [
        ({"encoder": toys.ADAM}, r"no optimizer for \['decoder'\]"),
        ({**toys.OPTIMIZERS, "head": toys.ADAM}, r"optimizers for \['head'\], but the submodels are"),
    ],
)
def test_factories_that_do_not_fit(factories, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizers(toys.auto_encoder(), factories)


@pytest.mark.parametrize(
    ("factory", "found"), [(list, "is a list"), (torch.optim.LBFGS, "is a LBFGS, .*without a closure")]
)
def test_what_takes_no_step_alone_is_refused(factory, found):
    with pytest.raises(ConfigError, match=f"the optimizer of encoder {found}"):
        build_optimizers(toys.auto_encoder(), factory)


def test_parameter_outside_of_all_submodels_is_refused():
    model = toys.auto_encoder()
    model.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(ConfigError, match="'scale' belongs to no submodel"):
        build_optimizers(model, toys.ADAM)


def test_parameter_of_two_submodels_is_refused():
    model = Pair(nn.Linear(3, 3), nn.Linear(3, 3))
    model.second.weight = model.first.weight
    with pytest.raises(ConfigError, match=r"'first.weight' belongs to the submodels \['first', 'second'\]"):
        build_optimizers(model, toys.ADAM)


def test_nothing_to_train_is_refused():
    model = toys.auto_encoder()
    model.requires_grad_(requires_grad=False)
    with pytest.raises(ConfigError, match="nothing to train"):
        build_optimizers(model, toys.ADAM)


def test_float64_takes_the_batches_of_the_dataset_as_they_are():
    model = toys.auto_encoder()
    place(model, "single", precision="float64", device=torch.device("cpu"))
    seen = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    model(torch.ones(2, 5))
    assert seen == [torch.float64]


def sharded_submodels(strategy: str, directory: Path) -> list[int]:
    model = toys.auto_encoder()
    whole = [sum(parameter.numel() for parameter in leaf.parameters()) for leaf in model.leaves().values()]
    place(model, strategy, precision="float32", device=torch.device("cpu"))
    mine = [
        sum(local(parameter).numel() for parameter in leaf.parameters() if parameter.requires_grad)
        for leaf in model.leaves().values()
    ]
    return [part - full for part, full in zip(mine, whole, strict=True)]


def local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
def test_every_submodel_is_sharded(strategy, tmp_path):
    for savings in run_ranks(sharded_submodels, 2, strategy, tmp_path):
        assert all(saving < 0 for saving in savings)

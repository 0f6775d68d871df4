from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError

from keepbest.callbacks.offline_loss import OfflineLossCallback
from keepbest.errors import ConfigError
from keepbest.models import CompositeModel
from keepbest.training.config import RunConfig
from keepbest.training.trainer import build_trainer
from tests.kit import toys
from tests.kit.pool import run_ranks

YAML = """
directory: PLACE
seed: 11
model: {kind: tests.kit.toys.AutoEncoder, hidden: 6}
data:
  train: {kind: tests.kit.toys.Waves}
  val: {kind: tests.kit.toys.Waves, length: 9, phase: 0.5}
optimizers:
  encoder: {kind: torch.optim.AdamW, lr: 0.05}
  decoder: {kind: torch.optim.SGD, lr: 0.1, momentum: 0.9}
trainer:
  epochs: 1
  effective_batch_size: 24
  callbacks:
    - {kind: keepbest.callbacks.OfflineLossCallback, dataset_key: val, every_n_epochs: 1}
"""


def settings(directory: Path, **changes: Any) -> dict[str, Any]:
    return {**yaml.safe_load(YAML), "directory": str(directory), **changes}


class Nested(toys.AutoEncoder):
    def __init__(self, parts: list[torch.nn.Module], named: dict[str, torch.nn.Module]) -> None:
        CompositeModel.__init__(self, {"encoder": parts[0], **named})


def test_run_from_yaml(tmp_path):
    trainer = build_trainer(RunConfig.model_validate(settings(tmp_path)))
    trainer.train()
    assert trainer.model.encoder[0].out_features == 6
    assert isinstance(trainer.callbacks[0], OfflineLossCallback)
    assert isinstance(trainer.optimizers["decoder"], torch.optim.SGD)
    assert trainer.optimizers["encoder"].param_groups[0]["lr"] == 0.05
    assert "loss/val/total" in (tmp_path / "metrics.jsonl").read_text()


def test_the_seed_decides_the_weights(tmp_path):
    models = [RunConfig.model_validate(settings(tmp_path, seed=seed)).build_model() for seed in (1, 1, 2)]
    first, second, third = (model.state_dict()["encoder.0.weight"] for model in models)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_components_inside_of_components_are_built(tmp_path):
    linear = {"kind": "torch.nn.Linear", "in_features": 5, "out_features": 3}
    model = {"kind": f"{__name__}.Nested", "parts": [linear], "named": {"decoder": {**linear, "out_features": 2}}}
    built = RunConfig.model_validate(settings(tmp_path, model=model)).build_model()
    assert (built.encoder.out_features, built.decoder.out_features) == (3, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sede": 1}, "sede"),
        ({"trainer": {"epochs": 1, "effective_batch_size": 2, "batch": 1}}, "trainer.batch"),
        ({"trainer": {"epochs": 1, "updates": 1, "effective_batch_size": 2}}, "exactly one of epochs"),
        ({"trainer": {"effective_batch_size": 2}}, "exactly one of epochs"),
        ({"trainer": {"epochs": 1, "effective_batch_size": 2, "strategy": "fsdp"}}, "'single', 'ddp', 'fsdp1'"),
        ({"trainer": {"epochs": 1, "effective_batch_size": 2, "callbacks": [{"name": "Offline"}]}}, "OfflineLossCall"),
        ({"model": {"hidden": 3}}, "model.kind"),
        ({"optimizer": {"kind": "torch.optim.SGD"}}, "either optimizer"),
        ({"optimizers": None}, "either optimizer"),
    ],
)
def test_config_that_cannot_be_right(changes, message, tmp_path):
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate(settings(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"kind": "tests.kit.toys.AutoEncoder", "hiden": 3}}, "AutoEncoder with hiden=3: .*hiden"),
        ({"model": {"kind": "tests.kit.toys.Auto"}}, "has no 'Auto'"),
        ({"model": {"kind": "torch.nn.Identity"}}, "expected a keepbest Model"),
        ({"data": {"train": {"kind": "nowhere.Waves"}}}, "no module 'nowhere'"),
        ({"optimizers": None, "optimizer": {"kind": "torch.optim.SGD", "rate": 1}}, "SGD .*rate"),
    ],
)
def test_what_cannot_be_built(changes, message, tmp_path):
    config = RunConfig.model_validate(settings(tmp_path, **changes))
    with pytest.raises(ConfigError, match=message):
        build_trainer(config)


class OnRank0Only(toys.Waves):
    def __init__(self) -> None:
        super().__init__()
        if torch.distributed.get_rank() != 0:
            raise ConfigError("the files are not on this host")


def missing_data(directory: Path) -> str:
    data = {"train": {"kind": f"{__name__}.OnRank0Only"}}
    config = RunConfig.model_validate(settings(directory, data=data))
    with pytest.raises(ConfigError) as caught:
        build_trainer(config)
    return str(caught.value)


def test_dataset_that_one_rank_lacks_is_an_error_on_all(tmp_path):
    messages = run_ranks(missing_data, 2, tmp_path)
    assert messages[0] == messages[1]
    assert "rank 1" in messages[0]
    assert "the files are not on this host" in messages[0]

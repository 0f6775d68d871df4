"""Each setting is written once, and every face takes the same ones and refuses the rest in the same words."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
from torch import nn

import keepbest
from docs import settings_table
from keepbest import BestKeeper
from keepbest.callbacks import BestCheckpointCallbackConfig
from keepbest.errors import ConfigError
from keepbest.metric_properties import MetricPropertyProvider
from keepbest.settings import KeeperSettings
from keepbest.settings_dict import KeeperSettingsDict
from tests.faces import FACES
from tests.kit.pool import run_ranks

ROOT = Path(__file__).resolve().parents[1]


def test_typed_dict_has_the_names_and_types_of_the_model():
    hints = get_type_hints(KeeperSettings)
    assert get_type_hints(KeeperSettingsDict) == {name: hints[name] for name in KeeperSettings.model_fields}
    assert not KeeperSettingsDict.__required_keys__


def test_callback_has_every_setting_but_that_of_the_resume():
    fields = BestCheckpointCallbackConfig.model_fields
    of_the_trainer = KeeperSettings.model_fields.keys() - fields.keys()
    assert of_the_trainer == {"resume", "existing"}
    assert all(fields[name].description for name in KeeperSettings.model_fields if name not in of_the_trainer)


def test_page_of_the_settings_is_up_to_date():
    page = settings_table.PAGE.read_text()
    assert settings_table.with_table(page) == page, "run python -m docs.settings_table"
    assert all(f"\n| `{name}` | " in page for name in KeeperSettings.model_fields)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tolerence": [1]}, "there is no setting 'tolerence'; did you mean 'tolerances'? The settings are: "),
        ({"patience": 3}, "there is no setting 'patience'; did you mean 'tolerances'?"),
        ({"mode": "min"}, "there is no setting 'mode'; did you mean 'higher_is_better'?"),
        ({"tolerances": 3}, "tolerances must be a list such as [3], found 3"),
        ({"model_names": "encoder"}, "model_names must be a list such as ['encoder'], found 'encoder'"),
        (
            {"higher_is_better": "min"},
            "(higher values are better), false (lower values are better) or absent, found 'min'",
        ),
        ({"tolerances": [1, 1]}, "tolerances must be integers that differ from each other, found [1, 1]"),
        ({"keep_top_k": 0}, "keep_top_k must be greater than 0, found 0"),
        ({"async_save": "no"}, "async_save must be a valid boolean, found 'no'"),
        ({"format": "pickle"}, "format must be 'torch', 'safetensors' or 'dcp', found 'pickle'"),
        ({"save_timeout": -1.0}, "save_timeout must be greater than 0, found -1.0"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_every_face_refuses_a_setting_in_the_same_words(face, settings, message, tmp_path):
    with pytest.raises(ConfigError) as caught:
        FACES[face](tmp_path / "run", settings)
    assert message in str(caught.value)
    assert "pydantic" not in str(caught.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("face", ["lightning", "transformers", "ignite"])
def test_adapter_refuses_a_setting_before_training(face):
    module = pytest.importorskip(f"keepbest.integrations.{face}")
    with pytest.raises(ConfigError, match="'tolerances'"):
        module.BestCheckpoint(*([nn.Linear(1, 1)] if face == "ignite" else []), "loss", directory="run", tolerence=[1])


ADAPTERS = {
    "lightning": [
        ({"metric_key": 5}, "metric_key must be the name of a metric"),
        ({"metric_key": " "}, "metric_key must be the name of a metric"),
        ({"save_training_state": "no"}, "save_training_state must be a valid boolean, found 'no'"),
        ({"every_n_train_steps": "5"}, "every_n_train_steps must be an integer of at least 1, found '5'"),
        ({"every_n_train_steps": True}, "every_n_train_steps must be an integer of at least 1, found True"),
    ],
    "transformers": [
        ({"metric_key": 5}, "metric_key must be the name of a metric"),
        ({"metric_key": ""}, "metric_key must be the name of a metric"),
        ({"save_training_state": "no"}, "save_training_state must be a valid boolean, found 'no'"),
    ],
    "ignite": [({"model": nn.Linear(1, 1), "metric_key": None}, "metric_key must be the name of a metric")],
}


@pytest.mark.parametrize("face", ADAPTERS)
def test_adapter_takes_no_argument_of_its_own_for_another(face):
    module = pytest.importorskip(f"keepbest.integrations.{face}")
    for arguments, message in ADAPTERS[face]:
        with pytest.raises(ConfigError) as caught:
            module.BestCheckpoint(**{"metric_key": "loss", "directory": "run", **arguments})
        assert message in str(caught.value)


@pytest.mark.parametrize("face", ["callback", "command_line"])
def test_trainer_alone_says_when_a_run_is_resumed(face, tmp_path):
    with pytest.raises(ConfigError, match="there is no setting 'resume'"):
        FACES[face](tmp_path / "run", {"resume": "ledger"})


@pytest.mark.parametrize(
    "settings",
    [
        {"tolerances": 3},
        {"tolerances": "12"},
        {"tolerances": {1, 2}},
        {"tolerances": [True]},
        {"tolerances": [1.0]},
        {"tolerances": [-1]},
        {"model_names": "encoder"},
        {"model_names": [1]},
        {"save_frozen_weights": 1},
        {"higher_is_better": "min"},
        {"min_delta": "0.1"},
        {"min_delta": True},
        {"min_delta": -0.1},
        {"min_delta": float("nan")},
        {"keep_top_k": 1.0},
        {"keep_top_k": True},
        {"on_nonfinite": None},
        {"id": 3},
        {"id": ""},
        {"id": " "},
        {"rank_timeout": 0},
        {"rank_timeout": float("inf")},
        {"save_timeout": 1e300},
        {"resume": True},
    ],
    ids=str,
)
def test_value_of_another_type_or_range_is_not_converted(settings):
    [name] = settings
    with pytest.raises(ConfigError, match=rf"^{name}(\.0)? must be .*, found "):
        KeeperSettings.of(settings)


@pytest.mark.parametrize("metric_key", ["", "  ", "\n", None, 5])
def test_metric_without_a_name_is_refused(metric_key, tmp_path):
    with pytest.raises(ConfigError, match="metric_key must be the name of a metric, such as 'loss/val/total', got"):
        BestKeeper(nn.Linear(1, 1), directory=tmp_path, metric_key=metric_key, higher_is_better=False)


@pytest.mark.parametrize("provider", [MetricPropertyProvider, 5, {"loss": False}], ids=["class", "int", "dict"])
def test_what_knows_no_direction_is_no_provider(provider, tmp_path):
    with pytest.raises(ConfigError, match=r"^metric_property_provider must be a MetricPropertyProvider\(\), got"):
        BestKeeper(nn.Linear(1, 1), directory=tmp_path, metric_key="loss", metric_property_provider=provider)


@pytest.mark.parametrize(
    ("face", "needed"),
    [
        (KeeperSettings, {}),
        (BestCheckpointCallbackConfig, {"name": "BestCheckpointCallback", "metric_key": "loss", "every_n_epochs": 1}),
    ],
)
@pytest.mark.parametrize("kind", [list, tuple, deque])
def test_sequences_come_back_as_lists(kind, face, needed):
    settings = face(tolerances=kind([2, 1]), model_names=kind(["b", "a"]), **needed)
    assert (settings.tolerances, settings.model_names) == ([1, 2], ["b", "a"])


def test_sequences_and_integers_are_taken_as_what_they_mean():
    settings = KeeperSettings.of(
        {"tolerances": range(3, 0, -1), "model_names": ["a"], "min_delta": 1, "rank_timeout": 5}
    )
    assert (settings.tolerances, settings.model_names) == ([1, 2, 3], ["a"])
    assert [type(value) for value in (settings.min_delta, settings.rank_timeout)] == [float, float]


def test_numbers_of_numpy_and_torch_are_taken_as_what_they_are():
    settings = KeeperSettings.of(
        {
            "tolerances": np.array([3, 1]),
            "min_delta": np.float32(0.5),
            "keep_top_k": np.int64(2),
            "higher_is_better": np.bool_(True),
            "rank_timeout": torch.tensor(5.0),
        }
    )
    found = [
        settings.tolerances,
        settings.min_delta,
        settings.keep_top_k,
        settings.higher_is_better,
        settings.rank_timeout,
    ]
    assert repr(found) == "[[1, 3], 0.5, 2, True, 5.0]"
    assert repr(KeeperSettings.of({"tolerances": [np.int32(1)]}).tolerances) == "[1]"
    for wrong in ({"keep_top_k": np.float64(2.0)}, {"tolerances": [np.float64(1.0)]}, {"min_delta": np.bool_(True)}):
        with pytest.raises(ConfigError, match="must be a valid"):
            KeeperSettings.of(wrong)


def test_config_of_the_callback_survives_json():
    config = BestCheckpointCallbackConfig(metric_key="loss", every_n_epochs=1, tolerances=[2, 1], model_names=["a"])
    assert BestCheckpointCallbackConfig.model_validate_json(config.model_dump_json()) == config


def test_all_wrong_settings_are_reported_together():
    with pytest.raises(ConfigError, match=r"(?s)keep_top_k must be .*\nthere is no setting 'min_detla'"):
        KeeperSettings.of({"keep_top_k": 0, "min_detla": 1.0})


def make_with_something_wrong_on_rank_1(directory, wrong):
    from keepbest.ranks import Ranks

    settings = wrong if Ranks.connect().rank == 1 else {}
    started = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        BestKeeper(nn.Linear(1, 1), directory=directory, metric_key="loss", **settings)
    assert time.monotonic() - started < 20
    return str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank_timeout": -1.0}, "rank_timeout must be greater than 0, found -1.0"),
        ({"save_timeout": "long"}, "save_timeout must be a valid number, found 'long'"),
        ({"rank_timeout": float("nan")}, "rank_timeout must be "),
        ({"rank_timeout": None}, "rank_timeout must be a valid number, found None"),
        ({"tolerence": [1]}, "there is no setting 'tolerence'; did you mean 'tolerances'?"),
    ],
)
def test_setting_that_is_wrong_on_one_rank_is_reported_on_all(wrong, message, tmp_path):
    told = run_ranks(make_with_something_wrong_on_rank_1, 2, tmp_path / "run", wrong)
    assert told == [told[0]] * 2
    assert f"rank 1 of 2: ConfigError: {message}" in told[0]


def test_setting_added_to_the_model_is_accepted_by_every_face(tmp_path):
    package = tmp_path / "keepbest"
    shutil.copytree(Path(keepbest.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    source = (package / "settings.py").read_text()
    place = "    rank_timeout: "
    assert source.count(place) == 1
    added = '    warmth: int = Field(default=0, ge=0, description="How warm it is.")\n'
    (package / "settings.py").write_text(source.replace(place, added + place))

    paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "tests.faces", "warmth=7"]
    ended = subprocess.run(
        command, cwd=tmp_path, env=os.environ | paths, capture_output=True, text=True, timeout=200, check=False
    )
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    assert told["package"] == str(package / "__init__.py")
    assert told["arrived"] == {face: [7] for face in FACES}

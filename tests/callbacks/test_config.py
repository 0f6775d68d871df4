from __future__ import annotations

import textwrap
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ValidationError

import keepbest.callbacks as package
from keepbest.callbacks import (
    CallbackBase,
    CallBackBaseConfig,
    Discriminated,
    OfflineLossCallback,
    OfflineLossCallbackConfig,
    RegisteredConfig,
)
from keepbest.errors import ConfigError


class Holder(BaseModel):
    callbacks: list[Annotated[Any, Discriminated(CallBackBaseConfig)]]


OFFLINE_LOSS = {"every_n_epochs": 1, "dataset_key": "val"}


@pytest.mark.parametrize(
    "choice",
    [
        {"kind": "keepbest.callbacks.OfflineLossCallback"},
        {"kind": "keepbest.callbacks.offline_loss.OfflineLossCallback"},
        {"kind": "keepbest.callbacks.OfflineLossCallbackConfig"},
        {"name": "OfflineLossCallback"},
        {"kind": "keepbest.callbacks.OfflineLossCallback", "name": "OfflineLossCallback"},
    ],
)
def test_mapping_becomes_the_config_of_its_kind_or_name(choice):
    [config] = Holder(callbacks=[choice | OFFLINE_LOSS]).callbacks
    assert type(config) is OfflineLossCallbackConfig
    assert config.dataset_key == "val"
    assert config.callback_class is OfflineLossCallback


def test_a_config_stays_what_it_is_and_survives_json():
    config = OfflineLossCallbackConfig(**OFFLINE_LOSS, batch_size=3)
    holder = Holder(callbacks=[config])
    assert holder.callbacks == [config]
    assert Holder.model_validate_json(holder.model_dump_json()) == holder


def test_public_configs_are_registered_by_callback_name():
    configs = [
        value
        for value in vars(package).values()
        if isinstance(value, type) and issubclass(value, CallBackBaseConfig) and value.model_fields["name"].default
    ]
    assert len(configs) >= 2
    for config in configs:
        assert CallBackBaseConfig.find(kind=None, name=config.callback_type.__name__) is config


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            {"kind": "keepbest.callbacks.OfflineLosCallback"},
            "did you mean '.*offline_loss.OfflineLossCallbackConfig'.*known: .*MetricEarlyStopperConfig",
        ),
        (
            {"kind": "keepbest.calbacks.OfflineLossCallback"},
            "no module 'keepbest.calbacks' .did you mean .*OfflineLossCallbackConfig",
        ),
        ({"kind": "OfflineLossCallback"}, "is not a dotted path .*did you mean"),
        ({"kind": "keepbest.data.DataContainer"}, "is neither a CallBackBaseConfig nor"),
        ({"kind": "keepbest.callbacks.PeriodicCallback"}, "is neither a CallBackBaseConfig nor"),
        ({"kind": 3}, "kind must be a string, found 3"),
        ({"name": "OfflineLoss"}, "unknown name 'OfflineLoss' .did you mean 'OfflineLossCallback'.*; known: "),
        ({}, "expected a kind .* or a name; known names: .*MetricEarlyStopper, .*OfflineLossCallback"),
        ({"kind": "keepbest.callbacks.OfflineLossCallback", "name": "MetricEarlyStopper"}, "OfflineLossCallback"),
    ],
)
def test_an_unknown_choice_tells_what_is_known_and_nearest(choice, message):
    with pytest.raises(ValidationError, match=message):
        Holder(callbacks=[choice | OFFLINE_LOSS])


def test_errors_name_the_place_of_the_setting():
    good = {"name": "OfflineLossCallback"} | OFFLINE_LOSS
    with pytest.raises(ValidationError) as caught:
        Holder(callbacks=[good, good | {"batch_size": 0, "dataset": "x"}])
    assert {error["loc"] for error in caught.value.errors()} == {
        ("callbacks", 1, "batch_size"),
        ("callbacks", 1, "dataset"),
    }


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"every_n_epochs": 1, "every_n_updates": 1},
        {"every_n_epochs": 0},
        {"every_n_epochs": True},
        {"every_n_epochs": "1"},
        {"every_n_epochs": 1, "batch_size": -1},
        {"every_n_samples": 10},
    ],
)
def test_wrong_intervals_are_refused(settings):
    with pytest.raises(ValidationError):
        CallBackBaseConfig(**settings)
    assert CallBackBaseConfig(every_n_samples=10, batch_size=2).interval.kind == "sample"


def test_configs_cannot_be_changed():
    config = OfflineLossCallbackConfig(**OFFLINE_LOSS)
    with pytest.raises(ValidationError, match="frozen"):
        config.dataset_key = "test"


def test_third_party_callbacks_are_imported_by_their_kind(tmp_path, monkeypatch):
    (tmp_path / "somebodys_callbacks.py").write_text(
        textwrap.dedent("""
            from typing import ClassVar, Literal

            from keepbest.callbacks import CallBackBaseConfig, OfflineLossCallback, PeriodicCallback

            class NoiseConfig(CallBackBaseConfig):
                name: Literal["Noise"] = "Noise"
                scale: float

            class Noise(PeriodicCallback):
                config_class: ClassVar[type[NoiseConfig]] = NoiseConfig

                def periodic_callback(self, **kwargs):
                    pass

            class Louder(Noise):
                pass

            class MyOfflineLoss(OfflineLossCallback):
                pass
            """)
    )
    (tmp_path / "broken_callbacks.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="unknown name 'Noise'"):
        CallBackBaseConfig.parse({"name": "Noise", "every_n_epochs": 1, "scale": 2})

    noise = CallBackBaseConfig.parse({"kind": "somebodys_callbacks.Noise", "every_n_epochs": 1, "scale": 2})
    import somebodys_callbacks

    assert type(noise) is somebodys_callbacks.NoiseConfig
    assert noise.callback_class is somebodys_callbacks.Noise
    by_name = CallBackBaseConfig.parse({"name": "Noise", "every_n_epochs": 1, "scale": 2})
    assert by_name.callback_class is somebodys_callbacks.Noise
    louder = CallBackBaseConfig.parse({"kind": "somebodys_callbacks.Louder", "every_n_epochs": 1, "scale": 2})
    assert louder.callback_class is somebodys_callbacks.Louder
    mine = CallBackBaseConfig.parse({"kind": "somebodys_callbacks.MyOfflineLoss"} | OFFLINE_LOSS)
    assert mine.callback_class is somebodys_callbacks.MyOfflineLoss
    assert OfflineLossCallbackConfig(**OFFLINE_LOSS).callback_class is OfflineLossCallback

    # A module that exists but cannot be imported is not an unknown kind.
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        CallBackBaseConfig.parse({"kind": "broken_callbacks.Noise"})


def test_each_root_has_a_registry_of_its_own():
    class ShapeConfig(RegisteredConfig):
        pass

    class CircleConfig(ShapeConfig):
        name: Literal["Circle"] = "Circle"

    class SmallCircleConfig(CircleConfig):
        pass

    assert ShapeConfig.parse({"name": "Circle"}) == CircleConfig()
    assert ShapeConfig.registry == {"Circle": CircleConfig}
    with pytest.raises(ConfigError, match="unknown name 'Circle'"):
        CallBackBaseConfig.find(kind=None, name="Circle")
    with pytest.raises(ConfigError, match="is neither a ShapeConfig nor"):
        ShapeConfig.find(kind="keepbest.callbacks.OfflineLossCallback", name=None)
    with pytest.raises(ConfigError, match=r"'Circle' of .*OtherCircleConfig is already taken by .*CircleConfig"):

        class OtherCircleConfig(ShapeConfig):
            name: Literal["Circle"] = "Circle"


def test_a_config_that_no_callback_names_says_so():
    class LonelyConfig(CallBackBaseConfig):
        name: Literal["Lonely"] = "Lonely"

    with pytest.raises(ConfigError, match="no callback has config_class = LonelyConfig"):
        _ = LonelyConfig(every_n_epochs=1).callback_class

    class Lonely(CallbackBase):
        config_class = LonelyConfig

    assert LonelyConfig(every_n_epochs=1).callback_class is Lonely

from __future__ import annotations

from typing import Literal

import pytest

from keepbest.callbacks import (
    CallBackBaseConfig,
    OfflineLossCallbackConfig,
    PeriodicCallback,
    TrainerView,
    assemble_callbacks,
)
from keepbest.errors import ConfigError
from tests.callbacks.context import make_context, make_samples


class NamedConfig(CallBackBaseConfig):
    name: Literal["Named"] = "Named"
    id: str | None = None


class Named(PeriodicCallback):
    config_class = NamedConfig

    def periodic_callback(self, **kwargs):
        pass


class LastConfig(CallBackBaseConfig):
    name: Literal["Last"] = "Last"


class Last(Named):
    config_class = LastConfig
    runs_last = True


def offline_loss(key="val", **settings):
    return {"kind": "keepbest.callbacks.OfflineLossCallback", "dataset_key": key, "every_n_epochs": 1} | settings


def test_order_is_that_of_the_configs_then_those_that_run_last():
    configs = [
        {"name": "Last", "every_n_epochs": 1},
        NamedConfig(every_n_epochs=1),
        {"name": "Last", "every_n_epochs": 2},
        offline_loss(),
        OfflineLossCallbackConfig(dataset_key="test", every_n_epochs=1),
    ]
    context = make_context({"val": make_samples(3), "test": make_samples(3)})
    assert [callback.state_key for callback in assemble_callbacks(configs, **context)] == [
        "Named/every_n_epochs=1",
        "OfflineLossCallback/every_n_epochs=1/val",
        "OfflineLossCallback/every_n_epochs=1/test",
        "Last/every_n_epochs=1",
        "Last/every_n_epochs=2",
    ]


def test_callbacks_that_cannot_be_told_apart_are_refused():
    context = make_context()
    with pytest.raises(
        ConfigError, match=r"callbacks\[0\] and callbacks\[2\] cannot be distinguished.*every_n_epochs=1/val"
    ):
        assemble_callbacks([offline_loss(), offline_loss(every_n_epochs=2), offline_loss(batch_size=3)], **context)
    named = [NamedConfig(every_n_epochs=1, id=identity) for identity in ("encoder", None, "Encoder")]
    assert len(assemble_callbacks(named[:2], **context)) == 2
    with pytest.raises(ConfigError, match="'Named/every_n_epochs=1/encoder' and 'Named/every_n_epochs=1/Encoder'"):
        assemble_callbacks(named, **context)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "Nmaed", "every_n_epochs": 1}, "unknown name 'Nmaed' .did you mean 'Named'"),
        (offline_loss(every_n_epochs=0), "every_n_epochs"),
        (offline_loss("vall"), "no dataset 'vall'"),
        ("OfflineLossCallback", "expected a mapping"),
    ],
)
def test_errors_name_the_place_in_the_list(config, message):
    with pytest.raises(ConfigError, match=rf"(?s)callbacks\[1\]: .*{message}"):
        assemble_callbacks([offline_loss(), config], **make_context())


def test_stand_in_shows_all_that_a_trainer_shows():
    [callback] = assemble_callbacks([NamedConfig(every_n_epochs=1)], **make_context())
    assert isinstance(callback.trainer, TrainerView)

"""The settings that adapters pass on are those of the keeper, and a name that is none is told at once."""

from __future__ import annotations

import inspect
from typing import get_type_hints

import pytest
from torch import nn

from keepbest import BestKeeper
from keepbest.errors import ConfigError
from keepbest.integrations import ignite, lightning, transformers
from keepbest.settings import KeeperSettings

# What an adapter has from its framework, or explains itself.
OF_THE_ADAPTER = {
    "self", "model", "directory", "metric_key", "higher_is_better", "metric_property_provider", "process_group",
}  # fmt: skip


def test_settings_that_are_passed_on_are_all_others_of_the_keeper():
    own = get_type_hints(BestKeeper.__init__)
    named = [name for name in inspect.signature(BestKeeper.__init__).parameters if name not in OF_THE_ADAPTER]
    assert {name: own[name] for name in named} == get_type_hints(KeeperSettings)


@pytest.mark.parametrize(
    "make",
    [
        lambda: lightning.BestCheckpoint("loss", tolerence=[1]),
        lambda: transformers.BestCheckpoint("loss", tolerence=[1]),
        lambda: ignite.BestCheckpoint(nn.Linear(1, 1), "loss", directory="run", tolerence=[1]),
    ],
    ids=["lightning", "transformers", "ignite"],
)
def test_setting_that_there_is_not_is_told_before_training(make):
    with pytest.raises(ConfigError, match="there is no setting tolerence; there are: async_save, "):
        make()

"""A callback that makes updates as slow as those of a large model."""

from __future__ import annotations

import time
from typing import Any, ClassVar, Literal

from keepbest.callbacks.config import CallBackBaseConfig
from keepbest.callbacks.periodic import PeriodicCallback


class PauseConfig(CallBackBaseConfig):
    name: Literal["Pause"] = "Pause"
    seconds: float


class Pause(PeriodicCallback):
    config_class: ClassVar[type[PauseConfig]] = PauseConfig

    def __init__(self, callback_config: PauseConfig, **kwargs: Any) -> None:
        super().__init__(callback_config, **kwargs)
        self._seconds = callback_config.seconds

    def periodic_callback(self, **_kwargs: Any) -> None:
        time.sleep(self._seconds)

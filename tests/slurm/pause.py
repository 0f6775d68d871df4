"""Updates as slow as those of a large model, and a model that is not there before the test lets it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, ClassVar, Literal

from keepbest.callbacks.config import CallBackBaseConfig
from keepbest.callbacks.periodic import PeriodicCallback
from tests.kit.toys import AutoEncoder


class PauseConfig(CallBackBaseConfig):
    name: Literal["Pause"] = "Pause"
    seconds: float


class Pause(PeriodicCallback):
    config_class: ClassVar[type[PauseConfig]] = PauseConfig

    def __init__(self, callback_config: PauseConfig, **kwargs: Any) -> None:
        super().__init__(callback_config, **kwargs)
        self._seconds = callback_config.seconds

    def periodic_callback(self, **_kwargs: Any) -> None:
        time.sleep(self._seconds)  # is the slow update


class LateAutoEncoder(AutoEncoder):
    """Shows by a file in `folder` that its rank has come here, and waits for the file `go` there."""

    def __init__(self, folder: str, dropout: float) -> None:
        (Path(folder) / f"rank{os.environ['SLURM_PROCID']}").touch()
        while not (Path(folder) / "go").exists():
            time.sleep(0.05)  # the test makes it, in another process
        super().__init__(dropout=dropout)

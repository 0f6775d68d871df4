"""A callback that holds all ranks at one update until the network is cut, or is not to be."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, ClassVar, Literal

from keepbest.callbacks.config import CallBackBaseConfig
from keepbest.callbacks.periodic import PeriodicCallback


class WaitForCutConfig(CallBackBaseConfig):
    name: Literal["WaitForCut"] = "WaitForCut"
    update: int
    folder: Path


class WaitForCut(PeriodicCallback):
    """Tells by a file in `folder` that its rank has come to `update`, and waits for the file `cut` there."""

    config_class: ClassVar[type[WaitForCutConfig]] = WaitForCutConfig

    def periodic_callback(self, *, update_counter: Any, **_kwargs: Any) -> None:
        folder: Path = self.callback_config.folder
        if update_counter.update != self.callback_config.update:
            return
        (folder / f"rank{self.ranks.rank}").touch()
        while not (folder / "cut").exists():
            time.sleep(0.01)  # the test makes it, in another process

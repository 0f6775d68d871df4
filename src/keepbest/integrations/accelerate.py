"""`AcceleratedKeeper`: a `BestKeeper` whose state is in what an `Accelerator` saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator  # type: ignore[import-untyped]  # ships without types
from accelerate.utils import DistributedType  # type: ignore[import-untyped]
from torch import nn
from typing_extensions import Unpack

from keepbest.errors import ConfigError
from keepbest.keeper import BestKeeper
from keepbest.metric_properties import MetricPropertyProvider
from keepbest.new_best import Hook
from keepbest.remote.storage import local_path
from keepbest.run.takeover import Existing
from keepbest.settings_dict import KeeperSettingsDict

# What the newest saved state names is kept under one tag: nothing says which of them are removed.
_PIN = "accelerate"


class AcceleratedKeeper(BestKeeper):
    """Is saved by `accelerator.save_state`, and loaded by `accelerator.load_state`. Creating one is **collective**.

    What a state names is made durable before it is written, and kept until the next one is. `load_state` comes before
    the keeper starts, so before its block is entered.

    Args:
        accelerator: Accelerator of the loop.
        model: Model as `accelerator.prepare` returned it.
        directory: Directory of the run. It must not be the `project_dir` of an accelerator with
            `automatic_checkpoint_naming`, which takes all that is in the folder `checkpoints` there for its own.
        metric_key: Name of the monitored metric.
        metric_property_provider: As in `BestKeeper`.
        process_group: As in `BestKeeper`.
        training_state: As in `BestKeeper`: optimizers, schedulers and the like, as `accelerator.prepare` returned them.
        on_new_best: As in `BestKeeper`.
        **settings: The settings of `KeeperSettings`. They are described once, in the table of docs/settings.md.

    Raises:
        ConfigError: On every rank, if a setting is unknown or wrong, or Megatron-LM has the weights.
        DesyncError: On every rank, if their settings differ.
    """

    _existing = Existing(
        resume="accelerator.load_state(...) before the keeper starts, or resume='ledger'",
        set_aside="existing='set_aside'",
    )

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        *,
        directory: str | Path,
        metric_key: str,
        metric_property_provider: MetricPropertyProvider | None = None,
        process_group: dist.ProcessGroup | None = None,
        training_state: Mapping[str, Any] | None = None,
        on_new_best: Hook | Sequence[Hook] | None = None,
        **settings: Unpack[KeeperSettingsDict],
    ) -> None:
        if accelerator.distributed_type == DistributedType.MEGATRON_LM:
            raise ConfigError(
                "expected a model on one device, or one of DDP, FSDP or DeepSpeed, but the accelerator has one of "
                "Megatron-LM, whose weights keepbest cannot gather: save it by its own means"
            )
        project, place = accelerator.project_configuration, local_path(directory)
        if project.automatic_checkpoint_naming and Path(project.project_dir).resolve() == place.resolve():
            raise ConfigError(
                f"{directory} is the project_dir of an accelerator with automatic_checkpoint_naming, which counts and "
                "removes what is in its folder 'checkpoints': give the keeper a directory of its own"
            )
        super().__init__(
            model,
            directory=directory,
            metric_key=metric_key,
            metric_property_provider=metric_property_provider,
            process_group=process_group,
            training_state=training_state,
            on_new_best=on_new_best,
            **settings,
        )
        accelerator.register_for_checkpointing(self)
        self._hook = accelerator.register_save_state_pre_hook(self._pin)

    def close(self) -> None:
        # What is saved from now on names what is at its end, and moves no more.
        self._hook.remove()
        super().close()

    def abandon(self) -> None:
        self._hook.remove()
        super().abandon()

    def _pin(self, models: list[nn.Module], weights: list[dict[str, Any]], output_dir: str) -> None:
        """On every rank, before the accelerator writes."""
        self.flush(pin=_PIN)

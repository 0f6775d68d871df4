"""`AcceleratedKeeper`: a `BestKeeper` whose state is in what an `Accelerator` saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator  # type: ignore[import-untyped]  # ships without types
from accelerate.utils import DistributedType  # type: ignore[import-untyped]
from torch import nn

from keepbest.errors import ConfigError
from keepbest.keeper import BestKeeper

# What the newest saved state names is kept under one tag: nothing tells which of them are removed.
_PIN = "accelerate"
_REFUSED = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class AcceleratedKeeper(BestKeeper):
    """Is saved by `accelerator.save_state`, and loaded by `accelerator.load_state`. Creating one is **collective**.

    What a state names is made durable before it is written, and kept until the next one is. `load_state` comes before
    the keeper starts, so before its block is entered.

    Args:
        accelerator: of the loop.
        model: as `accelerator.prepare` returned it.
        directory: of the run; not the `project_dir` of an accelerator with `automatic_checkpoint_naming`, which takes
            all that is in the folder `checkpoints` there for its own.
        settings: the others of `BestKeeper`.

    Raises:
        ConfigError: on every rank, if a setting cannot be right, or DeepSpeed or Megatron-LM has the weights.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, *, directory: str | Path, **settings: Any) -> None:
        if accelerator.distributed_type in _REFUSED:
            raise ConfigError(
                f"expected a model on one device, or one of DDP or FSDP, but the accelerator has one of "
                f"{accelerator.distributed_type.value}, whose weights keepbest cannot gather: save it by its own means"
            )
        project = accelerator.project_configuration
        if project.automatic_checkpoint_naming and Path(project.project_dir).resolve() == Path(directory).resolve():
            raise ConfigError(
                f"{directory} is the project_dir of an accelerator with automatic_checkpoint_naming, which counts and "
                "removes what is in its folder 'checkpoints': give the keeper a directory of its own"
            )
        super().__init__(model, directory=directory, **settings)
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

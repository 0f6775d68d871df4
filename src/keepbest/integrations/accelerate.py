"""`AcceleratedKeeper`: a `BestKeeper` whose state is in what an `Accelerator` saves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator  # type: ignore[import-untyped]  # ships without types
from accelerate.utils import DistributedType  # type: ignore[import-untyped]
from torch import nn
from typing_extensions import Unpack

from keepbest.errors import ConfigError
from keepbest.face import Face
from keepbest.keeper import BestKeeper
from keepbest.metric_properties import MetricPropertyProvider
from keepbest.new_best import Hook
from keepbest.ranks import NO_REMEDY
from keepbest.remote.storage import local_path
from keepbest.run.takeover import Existing
from keepbest.settings_dict import KeeperSettingsDict

# What the newest saved state names is kept under one tag: nothing says which of them are removed.
_PIN = "accelerate"

_RESUME = "resume='ledger'"


class AcceleratedKeeper(BestKeeper):
    """Is saved by `accelerator.save_state`, and loaded by `accelerator.load_state`. Creating one is **collective**.

    What a state names is made durable before it is written, and kept until the next one is. `load_state` comes before
    the keeper starts, so before its block is entered. The state of a keeper is a file of its name, so an accelerator
    loads states that were saved with other keepers, or with none.

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

    _face = Face(
        Existing(
            resume=f"accelerator.load_state(...) when the keeper is there and has not started, or {_RESUME}",
            set_aside="existing='set_aside'",
        )
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
        if not hasattr(accelerator, "distributed_type"):
            raise ConfigError(
                f"expected an Accelerator first, and then the model; found {type(accelerator).__name__} in its place"
            )
        if accelerator.distributed_type == DistributedType.MEGATRON_LM:
            raise ConfigError(
                "expected a model on one device, or one of DDP, FSDP or DeepSpeed, but the accelerator has one of "
                "Megatron-LM, whose weights keepbest cannot gather: save it by its own means"
            )
        project, place = accelerator.project_configuration, local_path(directory, "directory")
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
        self._accelerator = accelerator
        self._hooks = [
            accelerator.register_save_state_pre_hook(self._save_to),
            accelerator.register_load_state_pre_hook(self._load_from),
        ]

    def abandon(self) -> None:
        for hook in self._hooks:
            hook.remove()
        super().abandon()

    def _save_to(self, models: list[nn.Module], weights: list[dict[str, Any]], output_dir: str) -> None:
        """On every rank, before the accelerator writes. **Collective** until the keeper closes."""
        file = Path(output_dir) / self._file
        if self._phase == "closed":  # what it names moves no more, and its ranks may be gone
            self._write(file)
            return
        if self._phase == "started":
            self.flush(pin=_PIN)
        self._ranks.agree(f"write the state of {self.name}", lambda: self._write(file), remedy=NO_REMEDY, saving=True)

    def _load_from(self, models: list[nn.Module], input_dir: str) -> None:
        """On every rank, before the accelerator loads. **Collective** until the keeper closes."""
        if self._phase == "closed":  # the states are loaded for what comes after
            return
        file = Path(input_dir) / self._file
        state = self._ranks.broadcast(f"read the state of {self.name}", lambda: self._read(file), remedy=NO_REMEDY)
        if state is not None:
            self.load_state_dict(state)
            # A kill in the middle of a save leaves this state newer than what is written after it. The loop then
            # observes its last iteration once more.
            self._saver.is_in_doubt = True
        elif self._phase == "new":
            self._face = self._face.resumed_by(f"{_RESUME}, since {input_dir} has no state of {self.name}")

    @property
    def _file(self) -> str:
        return f"keepbest.{self.name}.json"

    def _write(self, file: Path) -> None:
        accelerator = self._accelerator
        on_each_node = accelerator.project_configuration.save_on_each_node
        if accelerator.is_local_main_process if on_each_node else accelerator.is_main_process:
            # An accelerator may have keepers of this name in several directories, one after the other or at once.
            states = _states_in(file) if file.exists() else {}
            new = file.with_suffix(".new")
            new.write_text(json.dumps({**states, str(self.directory): self.state_dict()}))
            new.replace(file)

    def _read(self, file: Path) -> dict[str, Any] | None:
        if not file.exists():
            return None
        if self._phase != "new":
            raise ConfigError(
                f"accelerator.load_state comes too late for the keeper of {self.metric_key}: load the state before "
                "the block of the keeper is entered, and before observe()"
            )
        states = _states_in(file)
        mine = str(self.directory)
        if mine not in states and len(states) > 1:
            raise ConfigError(
                f"{file} has the states of keepers in {', '.join(sorted(states))}, and this one is in {mine}: give "
                "the keeper one of these directories, or remove the other states"
            )
        found: dict[str, Any] | None = states.get(mine, next(iter(states.values()), None))
        return found


def _states_in(file: Path) -> dict[str, Any]:
    """{directory: state of a keeper}."""
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"expected the states of keepers in {file}, which is damaged: {error}; remove it") from error

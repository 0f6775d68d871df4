"""Every face of keepbest, as a function that has it make a keeper with some settings.

As a program it prints what a setting is in the keeper that each of them makes: `python -m tests.faces NAME=VALUE`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

import keepbest.settings
from keepbest import BestKeeper
from keepbest.callbacks import assemble_callbacks
from keepbest.cli.run_file import RunFile
from keepbest.training.trainer import build_trainer
from tests.callbacks.context import make_context
from tests.kit import cli_runs as runs


def nothing(*_: Any) -> None:
    """Stands in for a step of training, and for what Accelerate registers."""


def own_loop(directory: Path, settings: dict[str, Any]) -> None:
    BestKeeper(nn.Linear(1, 1), directory=directory, metric_key="loss", **settings)


def callback(directory: Path, settings: dict[str, Any]) -> None:
    config = {"name": "BestCheckpointCallback", "metric_key": "loss", "every_n_epochs": 1, **settings}
    assemble_callbacks([config], **make_context() | {"directory": directory})


def command_line(directory: Path, settings: dict[str, Any]) -> None:
    directory.mkdir(parents=True)
    content = runs.describe_run(directory, epochs=1)
    content["trainer"]["callbacks"] = [runs.evaluation(), runs.best(**settings)]
    build_trainer(RunFile.read(runs.write_config(directory / "run.yaml", content), {}).config)


def lightning(directory: Path, settings: dict[str, Any]) -> None:
    from pytorch_lightning import Trainer

    from keepbest.integrations.lightning import BestCheckpoint

    checkpoint = BestCheckpoint("loss", directory=directory, **settings)
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    checkpoint.on_train_start(trainer, nn.Linear(1, 1))
    checkpoint.on_exception(trainer, nn.Linear(1, 1), KeyboardInterrupt())


def transformers(directory: Path, settings: dict[str, Any]) -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from keepbest.integrations.transformers import BestCheckpoint

    checkpoint = BestCheckpoint("loss", directory=directory, **settings)
    arguments = TrainingArguments(directory, eval_strategy="epoch", use_cpu=True, report_to="none")
    state, control = TrainerState(), TrainerControl()
    checkpoint.on_train_begin(arguments, state, control, model=nn.Linear(1, 1))
    checkpoint.on_train_end(arguments, state, control)


def ignite(directory: Path, settings: dict[str, Any]) -> None:
    from ignite.engine import Engine

    from keepbest.integrations.ignite import BestCheckpoint

    checkpoint = BestCheckpoint(nn.Linear(1, 1), "loss", directory=directory, **settings)
    trainer, evaluator = Engine(nothing), Engine(nothing)
    checkpoint.attach(trainer, evaluator)
    trainer.run([0], max_epochs=1)


def accelerate(directory: Path, settings: dict[str, Any]) -> None:
    from keepbest.integrations.accelerate import AcceleratedKeeper

    accelerator = SimpleNamespace(
        distributed_type="NO",
        project_configuration=SimpleNamespace(automatic_checkpoint_naming=False),
        register_for_checkpointing=nothing,
        register_save_state_pre_hook=nothing,
        register_load_state_pre_hook=nothing,
    )
    AcceleratedKeeper(accelerator, nn.Linear(1, 1), directory=directory, metric_key="loss", **settings)


FACES: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    face.__name__: face for face in (own_loop, callback, command_line, lightning, transformers, ignite, accelerate)
}


def main(name: str, value: Any) -> None:
    arrived: dict[str, list[Any]] = {face: [] for face in FACES}
    check_settings = keepbest.settings.check_settings
    with tempfile.TemporaryDirectory() as folder:
        for face, make in FACES.items():

            def note(*arguments: Any, face: str = face, **others: Any) -> Any:
                checked = check_settings(*arguments, **others)
                arrived[face].append(getattr(checked.given, name))
                return checked

            keepbest.settings.check_settings = note
            make(Path(folder) / face, {name: value})
    print(json.dumps({"package": keepbest.__file__, "arrived": arrived}))


if __name__ == "__main__":
    given, _, text = sys.argv[1].partition("=")
    main(given, json.loads(text))

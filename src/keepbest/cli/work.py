"""The commands that run on every rank. **Collective**, inside `keepbest.launch.distributed()` or in one process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from keepbest.cli.console import say
from keepbest.cli.run_file import RunFile, parse_settings
from keepbest.cli.table import print_checkpoints
from keepbest.errors import ConfigError
from keepbest.load import LoadedSnapshot, load
from keepbest.modules.parts import Part, select_parts
from keepbest.ranks import NO_REMEDY, Ranks
from keepbest.run.layout import ledger_exists
from keepbest.run.no_links import check_own
from keepbest.run.reader import find_ref, only_best, read_history
from keepbest.training.config import CONFIG_FILE
from keepbest.training.trainer import build_trainer

_logger = logging.getLogger(__name__)


def train(config: Path, arguments: Sequence[str]) -> None:
    """Train as a config file says, and save its settings in the directory of the run.

    Args:
        config: Path of the config of the run, in YAML.
        arguments: Settings that replace those of the file, like `trainer.epochs=3`.

    Raises:
        KeepBestError: On every rank. Nothing was written if the config is invalid.
    """
    ranks = Ranks.connect()
    run = _read(ranks, config, lambda: parse_settings(arguments))
    trainer = build_trainer(run.config)
    if ranks.is_main and not run.config.trainer.callbacks:
        _logger.warning("trainer.callbacks is empty, so nothing is evaluated and no weights are kept")

    def keep_config() -> None:
        save = run.save if ranks.is_main else lambda: None
        remedy = f"Check that {run.config.directory} can be written"
        ranks.agree(f"save {CONFIG_FILE}", save, remedy=remedy, saving=True)

    # Not before training starts: until then the directory may turn out to hold another run.
    trainer.train(on_start=keep_config)
    if ranks.is_main:
        _print_what_is_kept(run.config.directory)


def _print_what_is_kept(directory: Path) -> None:
    try:
        if ledger_exists(directory):
            print_checkpoints(directory)
    except OSError as error:  # training went well, and all that it kept is on the disk
        _logger.warning(
            "training has ended well, but the table of what it kept cannot be printed: %s. Print it later: "
            "python -m keepbest show %s",
            error,
            directory,
        )


def evaluate(directory: Path, ref: str | None, arguments: Sequence[str], *, config: Path | None = None) -> None:
    """Evaluate a checkpoint with the callbacks of its run, and print what they log. Nothing is written.

    Args:
        directory: Directory of the run.
        ref: Name of the checkpoint; `None` is the best of the only metric that the run monitors.
        arguments: Settings that replace those of the run.
        config: Path of the config to use; `None` is that of the run.

    Raises:
        KeepBestError: On every rank, if the checkpoint cannot be found, loaded or evaluated.
    """
    ranks = Ranks.connect()

    def settings() -> dict[str, Any]:
        here = {"trainer.tracker": "none", "trainer.resume": None, "trainer.ema_decay": None}
        # The run may have been trained on another number of ranks.
        if ranks.world_size == 1:
            here["trainer.strategy"] = "single"
        return {**here, **parse_settings(arguments), "directory": str(directory)}

    def find() -> str:
        history = read_history(directory)
        name = ref or only_best(directory, history)
        find_ref(directory, history, name)
        return name

    # A wrong path is found here, before a config is looked for that is not there either.
    name = ranks.broadcast("look into the run", find, remedy=NO_REMEDY, saving=True)
    path = directory / CONFIG_FILE if config is None else config
    if config is None:
        ranks.agree(f"read the config {path}", lambda: _check_config(path), remedy=NO_REMEDY)
    run = _read(ranks, path, settings)
    if ranks.is_main:
        whose = "which came with the run" if config is None else "which you chose"
        say(f"this runs the classes that {path.absolute()} names, {whose}")
    trainer = build_trainer(run.config)
    loaded = load(directory, name, trainer.model)
    metrics = trainer.eval(update=loaded.iteration.update or 0)
    if not ranks.is_main:
        return
    # A run in training may have removed the snapshot by now, so nothing more is read of it.
    was = "" if loaded.metric_key is None else f": {loaded.metric_key} was {loaded.value!r} when it was saved"
    say(f"{name} of {loaded.iteration}{was}")
    for missing in _not_loaded(select_parts(trainer.model), loaded):
        say(f"note: {missing} was not saved and is as the config builds it; metrics that depend on it may differ")
    for key, value in metrics.items():
        say(f"{key} {value!r}")


def _check_config(path: Path) -> None:
    check_own(path)
    if not path.exists():
        raise ConfigError(
            f"{path} is missing: eval needs the config that train saves there; pass one with --config, or load the "
            "checkpoint in a script of yours (keepbest.load)"
        )


def _read(ranks: Ranks, path: Path, settings: Callable[[], dict[str, Any]]) -> RunFile:
    return ranks.agree(
        f"read the config {path.name}",
        lambda: RunFile.read(path, settings()),
        remedy=NO_REMEDY,
        state=lambda run: yaml.safe_dump(run.content).encode(),
    )


def _not_loaded(parts: Sequence[Part], loaded: LoadedSnapshot) -> list[str]:
    missing = []
    for part in parts:
        if any(name == part.name or part.name.startswith(f"{name}.") for name in loaded.parts):
            prefix = f"{part.path}." if part.path else ""
            inside = [key.removeprefix(prefix) for key in loaded.left_alone if key.startswith(prefix)]
            if keys := [key for key in inside if part.holds(key)]:
                missing.append(f"a part of {part.name} ({', '.join(keys)})")
        else:
            inner = [name for name in loaded.parts if not part.path or name.startswith(f"{part.path}.")]
            missing.append(f"{part.name} (except {', '.join(inner)})" if inner else part.name)
    return missing

"""Runs on two ranks that are killed: at a random time, or by their own file layer at one operation of a commit."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from keepbest.callbacks.best_checkpoint import BestCheckpointCallback
from keepbest.callbacks.config import CallBackBaseConfig
from keepbest.callbacks.offline_loss import OfflineLossCallback, OfflineLossCallbackConfig
from keepbest.callbacks.periodic import PeriodicCallback
from keepbest.run.layout import LEDGER, SNAPSHOTS
from tests.faults.disks import bare_file_system
from tests.kit import toys
from tests.kit.child import announce
from tests.kit.files import Operation, SteppedFiles
from tests.kit.seams import use

Moment = Literal["before", "halfway", "after"]

METRIC = "loss/val/total"
TOLERANCES = [0, 1, 3, 20]  # all but the last are exceeded, each before a later improvement
DROUGHTS = {4, 9, 10, 16, 17, 18, 19, 27, 34, 35}
UPDATES = 41
EVERY_UPDATE = {"every_n_updates": 1}
CALLBACKS = [
    {"name": "CheckpointCallback", "every_n_updates": 3},
    {"name": "LossWithDroughts", "dataset_key": "val", **EVERY_UPDATE},
]
BEST_CHECKPOINT = {"name": "BestCheckpointCallback", "metric_key": METRIC, "tolerances": TOLERANCES, **EVERY_UPDATE}

# What becomes durable in one piece, the operations of the file layer that it comes to, and how many it takes about.
# "append" is a write to the ledger. "save" also writes the snapshots of resume checkpoints.
COMMITS = {
    "save": {
        "make_folder": 1, "create": 3, "write": 60, "sync": 4, "sync_folder": 4, "rename": 2, "append": 1, "link": 1,
        "remove": 3,
    },
    "tolerance": {"append": 1, "sync": 1, "link": 1, "rename": 1, "sync_folder": 1, "remove": 1},
    "checkpoint": {"append": 1, "sync": 1, "link": 2, "rename": 3, "sync_folder": 1, "remove": 2},
    "end": {"append": 1, "sync": 1, "link": 1, "rename": 1, "sync_folder": 1},
}  # fmt: skip
OTHERS = {
    "begin": {"append": 2, "sync": 1, "remove": 2, "sync_folder": 1},
}  # fmt: skip
_DEADLY = {operation for operations in (*COMMITS.values(), *OTHERS.values()) for operation in operations} - {"append"}
_PATIENCE = 5  # in saves


@dataclass(frozen=True)
class Death:
    """Where rank 0 kills itself: at the `count`-th such operation. One that does not come is replaced by another."""

    place: str
    operation: str
    moment: Moment
    count: int


@dataclass(frozen=True)
class Session:
    """One start of a run. `notes` is a folder beside it, for what the ranks want to tell even if they are killed."""

    directory: Path
    notes: Path
    strategy: str
    async_save: bool = False
    file_format: str = "torch"
    remote: str | None = None
    is_bare: bool = False
    death: Death | None = None
    records_weights: bool = False

    @property
    def witnessed(self) -> Path:
        return self.notes / "witnessed.jsonl"

    @property
    def killed_at(self) -> Path:
        return self.notes / "killed_at.txt"

    @property
    def complaints(self) -> Path:
        return self.notes / "complaints.txt"


class Reaper:
    """The step of a file layer: knows when it is time, leaves a note and kills its own process."""

    def __init__(self, death: Death | None, note: Path) -> None:
        self._death = death
        self._note = note
        self._place = "begin"
        self._seen = 0
        self._saves = 0
        self._overdue = 0

    def __call__(self, operation: Operation) -> Any:
        name = operation.name
        if name == "write" and operation.path.name == LEDGER:
            name, self._place = "append", _place_of(bytes(operation.data))
        elif name in ("make_folder", "create") and SNAPSHOTS in operation.path.parent.parts:
            self._place = "save"
        elif name not in _DEADLY or (name == "remove" and not os.path.lexists(operation.path)):
            return operation.do()
        place = self._place
        moment = self._due(place, name)
        if moment == "halfway":
            operation.do_half()
            self._kill(place, f"half of {name}")
        result = operation.do() if moment in (None, "after") else None
        if moment is not None:
            self._kill(place, name)
        return result

    def _due(self, place: str, operation: str) -> Moment | None:
        death = self._death
        if death is None:
            return None
        self._saves += (place, operation) == ("save", "append")
        self._seen += (place, operation) == (death.place, death.operation)
        waits = death.place != "end" and self._saves >= _PATIENCE
        self._overdue += waits and place in COMMITS and operation != "write"
        return death.moment if death.count in (self._seen, self._overdue) else None

    def _kill(self, *circumstances: str) -> None:
        self._note.write_text(json.dumps(circumstances))
        os.kill(os.getpid(), signal.SIGKILL)


def _place_of(lines: bytes) -> str:
    """What the last of these lines of a ledger commits; the operations that follow belong to it too."""
    line = json.loads(lines.splitlines()[-1]) if lines else {"event": "between"}
    if line["event"] == "observation":
        return "save" if "snapshot" in line else "tolerance" if line.get("refs") else "between"
    return {"run": "begin", "session": "begin", "refs": "tolerance"}.get(line["event"], line["event"])


class LossWithDroughtsConfig(OfflineLossCallbackConfig):
    name: str = "LossWithDroughts"


class LossWithDroughts(OfflineLossCallback):
    """The loss of the model, bit for bit, but much worse at some updates."""

    config_class = LossWithDroughtsConfig

    def process_results(self, results: Any, *, interval_type: Any, update_counter: Any) -> None:
        worse = 1.0 if update_counter.update in DROUGHTS else 0.0
        results = {name: losses + worse for name, losses in results.items()}
        super().process_results(results, interval_type=interval_type, update_counter=update_counter)


class WitnessConfig(CallBackBaseConfig):
    name: str = "Witness"
    session: Session


class Witness(PeriodicCallback):
    """Notes down every value once the keeper is done with it, and the best that is durable then."""

    config_class = WitnessConfig

    def periodic_callback(self, *, update_counter: Any, **_kwargs: Any) -> None:
        session = self.callback_config.session
        iteration, keeper = str(update_counter.iteration), _keeper_of(self.trainer)
        if session.records_weights:
            weights = toys.whole_weights(self.trainer)
            if self.ranks.is_main:
                torch.save(weights, session.notes / f"{iteration}.pt")
        line = [iteration, self.log_writer.log_cache[METRIC].value, keeper.best_metric_value]
        with session.witnessed.open("ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")


def train(session: Session) -> dict[str, Any]:
    """What a rank of a run does."""
    announce("started")
    started = time.monotonic()
    logging.getLogger("keepbest").addHandler(logging.FileHandler(session.complaints, delay=True))
    rank = torch.distributed.get_rank()
    reaper = Reaper(session.death if rank == 0 else None, session.killed_at)
    file_system = bare_file_system() if session.is_bare else nullcontext()
    with file_system, use(session.directory, files=SteppedFiles(reaper)):
        return _train(session, started)


def _train(session: Session, started: float) -> dict[str, Any]:
    trainer = toys.make_trainer(
        session.directory,
        model=toys.auto_encoder(dropout=0.1),
        callbacks=[
            *CALLBACKS,
            {
                **BEST_CHECKPOINT,
                "async_save": session.async_save,
                "format": session.file_format,
                "remote": session.remote,
            },
            {"kind": f"{__name__}.Witness", "session": session, **EVERY_UPDATE},
        ],
        strategy=session.strategy,
        resume="auto",
        updates=UPDATES,
    )
    trained = [started]

    def on_start() -> None:
        trained.append(time.monotonic())
        announce("training")

    trainer.train(on_start=on_start)
    keeper = _keeper_of(trainer)
    return {
        "state": keeper.state.to_json(),
        "weights": toys.whole_weights(trainer),
        "start": trained[1] - started,
        "update": (time.monotonic() - trained[1]) / UPDATES,
    }


def _keeper_of(trainer: Any) -> Any:
    [callback] = [callback for callback in trainer.callbacks if isinstance(callback, BestCheckpointCallback)]
    return callback.keeper

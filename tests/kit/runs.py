"""Runs whose weights show when they were saved, and what is on the disk after them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from keepbest import BestKeeper, TrainingIteration


def update(number: int) -> TrainingIteration:
    return TrainingIteration(update=number)


class Run:
    """A model whose every weight is the number of the update, and a keeper of it."""

    def __init__(self, directory: Path, model: nn.Module | None = None, **settings):
        self.model = nn.Linear(1, 1) if model is None else model
        self.keeper = BestKeeper(self.model, directory=directory, **{"metric_key": "loss", **settings})

    def observe(self, *values, first: int = 1):
        """One value for each update from `first`; returns the outcomes."""
        outcomes = []
        for number, value in enumerate(values, start=first):
            set_weights(self.model, number)
            outcomes.append(self.keeper.observe(value, update(number)))
        return outcomes


def set_weights(model: nn.Module, number: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(number)


def refs(directory: Path) -> dict[str, str]:
    """{ref: snapshot}, from the links on the disk."""
    found = {}
    for path in (directory / "checkpoints").glob("best_model.*"):
        folder, name = path.readlink().parts
        assert (folder, path.resolve().is_dir()) == ("snapshots", True)
        found[path.name] = name
    return found


def snapshots(directory: Path) -> set[str]:
    """Those that have a name; the space of others may still be on its way back."""
    return {path.name for path in (directory / "checkpoints" / "snapshots").glob("[!.]*")}


def saved_at(directory: Path, ref: str) -> int:
    """The update whose weights a ref holds, by nothing but torch.load."""
    state = torch.load(directory / "checkpoints" / ref / "model.pt", weights_only=True)
    values = {value for tensor in state.values() for value in tensor.flatten().tolist()}
    assert len(values) == 1
    return int(values.pop())


def ledger(directory: Path) -> list[dict]:
    """The events, without the checksums of their lines."""
    lines = map(json.loads, (directory / "checkpoints" / "ledger.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "crc"} for line in lines]

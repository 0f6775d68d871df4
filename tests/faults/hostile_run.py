"""A small finished run, and what it answers once somebody has changed it behind its back."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import xxhash
from torch import nn

from keepbest import BestKeeper, TrainingIteration, load
from keepbest.errors import KeepBestError
from keepbest.run.manifest import manifest_digest
from keepbest.run.verify import verify
from tests.kit.ledger_lines import ledger_of as ledger
from tests.kit.ledger_lines import read_lines as lines
from tests.kit.ledger_lines import write_lines as rewrite

__all__ = ["ledger", "lines", "rewrite"]

BEST = "best_model.loss"
VALUES = [3.0, 2.0, 2.5, 1.0]  # new bests at 1, 2 and 4
NEWEST = "E4"


def net(fill: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    for parameter in model.parameters():
        nn.init.constant_(parameter, fill)
    return model


def settings(**changes):
    return {"metric_key": "loss", "higher_is_better": False, "tolerances": [0], **changes}


def make_run(directory: Path, values=VALUES, **changes) -> None:
    with BestKeeper(model := net(0.0), directory=directory, **settings(**changes)) as keeper:
        for epoch, value in enumerate(values, start=1):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(float(epoch))
            keeper.observe(value, TrainingIteration(epoch=epoch))


def checkpoints(run: Path) -> Path:
    return run / "checkpoints"


def snapshot(run: Path) -> Path:
    return checkpoints(run) / "snapshots" / NEWEST


def bits(model: nn.Module) -> list[list[float]]:
    return [tensor.flatten().tolist() for tensor in model.state_dict().values()]


def tree(folder: Path) -> dict[str, object]:
    """Every entry below, with what is in it; the lock tells the process that looked last, so its text is left out."""
    return {
        str(path.relative_to(folder)): (
            path.readlink() if path.is_symlink() else path.is_file() and path.name != "lock" and path.read_bytes()
        )
        for path in folder.rglob("*")
    }


def refused_load(run: Path, ref: str = BEST) -> str:
    """The reason why nothing was loaded."""
    model = net(-1.0)
    before = bits(model)
    with pytest.raises(KeepBestError) as refused:
        load(run, ref, model)
    assert bits(model) == before
    return f"{type(refused.value).__name__}: {refused.value}"


def refused_start(run: Path, resume: str | None = "ledger") -> str:
    """The reason why no keeper may work in the folder, which stays as it is."""
    before = tree(run.parent)
    with pytest.raises(KeepBestError) as refused:
        BestKeeper(net(0.0), directory=run, resume=resume, **settings()).start()
    assert tree(run.parent) == before
    return f"{type(refused.value).__name__}: {refused.value}"


def holds(run: Path, ref: str = BEST) -> set[float]:
    model = net(-1.0)
    load(run, ref, model)
    return {value for values in bits(model) for value in values}


def damage(run: Path) -> list[str]:
    return [fault.message for fault in verify(run) if fault.kind == "damage"]


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :]


class Evil:
    """A pickle of it creates a file when it is read without a check."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def forge(run: Path, state: object, *, save=torch.save, name: str = "model.pt") -> None:
    """Puts `state` in the place of a file of the newest weights, with manifest and ledger rewritten to match."""
    save(state, snapshot(run) / name)
    record(run)


def record(run: Path) -> None:
    """Rewrites manifests and ledger to match the files of all snapshots."""
    for path in run.glob("checkpoints/snapshots/*/snapshot.json"):
        with suppress(ValueError):  # it is what was forged
            manifest = json.loads(path.read_bytes())
            for name, file in manifest["files"].items():
                data = (path.parent / name).read_bytes()
                file.update(bytes=len(data), digest=xxhash.xxh3_128(data).hexdigest())
            path.write_bytes(json.dumps(manifest).encode())
    record_manifests(run)


def record_manifests(run: Path) -> None:
    """Rewrites the ledger to match the manifests of all snapshots."""
    with suppress(ValueError):  # as above
        entries = lines(run)
        for entry in entries:
            path = checkpoints(run) / f"snapshots/{entry.get('snapshot')}/snapshot.json"
            if path.is_file():
                entry["manifest"] = manifest_digest(path.read_bytes())
        rewrite(run, entries)


def forge_manifest(run: Path, manifest: object) -> None:
    (snapshot(run) / "snapshot.json").write_text(json.dumps(manifest))
    record_manifests(run)

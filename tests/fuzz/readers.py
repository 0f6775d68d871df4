"""What reads the files of a run that anybody may have written, and valid files to begin from."""

from __future__ import annotations

import io
import json
import pickle
import re
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from keepbest.errors import SnapshotError
from keepbest.formats.index import INDEX
from keepbest.formats.safetensors_file import FORMAT as SAFETENSORS
from keepbest.formats.sharded_part import ShardedPart
from keepbest.formats.tied import read_ties
from keepbest.formats.torch_file import FORMAT as TORCH
from keepbest.formats.whole_file import WholePart
from keepbest.reading.curve import close_up
from keepbest.reading.run import open_run
from keepbest.remote.verify import verify_run
from keepbest.run.manifest import manifest_digest
from keepbest.run.reader import read_history, read_manifest
from keepbest.run.verify import verify
from tests.faults.hostile_run import checkpoints, ledger, make_run, snapshot

# Of a whole line, or of one that was made anew without or with spaces.
_CHECKSUM = re.compile(rb'(, ?"crc": ?"[^"]*")?\}$')


class Reader(NamedTuple):
    """A file that is read, and how.

    Attributes:
        valid: Contents to begin from.
        read: Function that brings a content to the folder, and reads it.
    """

    valid: list[bytes]
    read: Callable[[bytes, Path], object]


def readers(space: Path) -> dict[str, Reader]:
    """All readers. Valid files are made below `space`."""
    runs = {each: space / each for each in ("torch", "safetensors", "dcp")}
    for file_format, run in runs.items():
        make_run(run, format=file_format)
    index = (snapshot(runs["dcp"]) / "model.dcp" / INDEX).read_bytes()
    shards = {path.name: path.read_bytes() for path in (snapshot(runs["dcp"]) / "model.dcp").glob("*.distcp")}
    tensors = {"a": torch.ones(2), "b": torch.ones(3).to_sparse()}
    torch.save({**tensors, "c": {"d": [1, "x", None, 2.5]}}, mixed := io.BytesIO())

    def read_dcp(data: bytes, folder: Path) -> None:
        for name, content in shards.items():
            (folder / name).write_bytes(content)
        (folder / INDEX).write_bytes(data)
        part = ShardedPart(folder, files={f"{folder.name}/{name}" for name in shards}, others={}, tied={})
        for key in part.kinds:
            part.fetch(key)
        part.fill({key: torch.zeros(2) for key in part.kinds if key == "0.bias"})

    ledgers = [ledger(run).read_bytes() for run in runs.values()]
    endings = {"torch": "pt", "safetensors": "safetensors"}
    files = {each: (snapshot(runs[each]) / f"model.{ending}").read_bytes() for each, ending in endings.items()}
    return {
        "ledger": Reader(ledgers, _read_ledger),
        "ledger with checksums": Reader(ledgers, _with_checksums(_read_ledger)),
        "manifest": Reader([(snapshot(run) / "snapshot.json").read_bytes() for run in runs.values()], _read_manifest),
        ".metadata": Reader([index, pickle.dumps(pickle.loads(index), protocol=5)], read_dcp),
        ".pt": Reader([files["torch"], mixed.getvalue()], _read_whole(TORCH, "model.pt")),
        "safetensors": Reader([files["safetensors"]], _read_whole(SAFETENSORS, "model.safetensors")),
        "remote": Reader(ledgers, _with_checksums(_read_listing)),
        "tied": Reader([json.dumps({"a": "b"}).encode()], _read_ties),
    }


def _with_checksums(read: Callable[[bytes, Path], None]) -> Callable[[bytes, Path], None]:
    """Gives each line a checksum that matches, as whoever forges a ledger does. No other line would be looked at."""

    def read_forged(data: bytes, folder: Path) -> None:
        bodies = (_CHECKSUM.sub(b"", line) for line in data.splitlines())
        read(b"".join(b'%b,"crc":"%08x"}\n' % (body, zlib.crc32(body)) for body in bodies), folder)

    return read_forged


def _read_whole(file_format, name: str) -> Callable[[bytes, Path], None]:
    def read(data: bytes, folder: Path) -> None:
        (folder / name).write_bytes(data)
        part = WholePart(file_format.read_file(folder / name))
        for key in part.kinds:
            part.fetch(key).contiguous()

    return read


def _read_ledger(data: bytes, folder: Path) -> None:
    checkpoints(folder).mkdir(exist_ok=True)
    (checkpoints(folder) / "snapshots").mkdir(exist_ok=True)
    ledger(folder).write_bytes(data)
    history = read_history(folder)
    history.kept()
    verify(folder)
    run = open_run(folder)
    run.history()
    with suppress(SnapshotError):  # nothing was observed
        for curve in run.curves():
            close_up(curve)


def _read_manifest(data: bytes, folder: Path) -> None:
    (folder / "snapshot.json").write_bytes(data)
    read_manifest(folder, manifest_digest(data))


def _read_listing(data: bytes, folder: Path) -> None:
    """A remote copy whose objects have names, and whose ledger names others."""
    remote = folder / "remote"
    (remote / "checkpoints").mkdir(parents=True, exist_ok=True)
    (remote / "checkpoints/ledger.jsonl").write_bytes(data)
    verify_run(f"file://{remote}")


def _read_ties(data: bytes, folder: Path) -> None:
    (folder / "model.tied.json").write_bytes(data)
    read_ties(folder / "model.tied.json")

"""Ledgers as lists of lines: the one place where tests take a ledger apart and put one together."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def ledger_of(run: Path) -> Path:
    return run / "checkpoints" / "ledger.jsonl"


def read_lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in ledger_of(run).read_text().splitlines()]


def line_bytes(line: Mapping[str, Any]) -> bytes:
    """A line as a writer would have written it, with its checksum, however little sense it makes."""
    body = json.dumps({key: value for key, value in line.items() if key != "crc"}).encode()[:-1]
    return b'%b,"crc":"%08x"}\n' % (body, zlib.crc32(body))


def write_lines(run: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    ledger_of(run).parent.mkdir(parents=True, exist_ok=True)
    ledger_of(run).write_bytes(b"".join(map(line_bytes, lines)))

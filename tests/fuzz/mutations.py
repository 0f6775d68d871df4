"""Files that are nearly right. Pure: the same generator of chance gives the same files."""

from __future__ import annotations

import json
import pickle
import random
import struct
from typing import Any

MARK = "keepbest-fuzz-it-ran"


class Payload:
    """A pickle of it leaves a mark in the working directory when it is read without a check."""

    def __reduce__(self):
        return open, (MARK, "w")


PAYLOAD = pickle.dumps(Payload())
# Names that a pickle may ask for, and what it may do with them.
_PIECES = [
    PAYLOAD, PAYLOAD[2:-1], b"cos\nsystem\n", b"\x8c\x02os\x8c\x06system\x93", b"\x8c\x08builtins\x8c\x04eval\x93",
    b"\x8c\x05torch\x8c\x04load\x93", b"R", b"b", b"\x81", b"0", b"2", b"r\xff\xff\xff\x7f",
    b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x85" * 2000, b"(", b"}", b"]", b"\x94", b"../../x", b"/etc/passwd",
    b"\0", b"\n", b"[" * 2000, b"9" * 400, b"-1", b"1e999", b"null", b'"\\u001b[31m"', b"PK\x03\x04", b"PK\x05\x06",
    b"\x1b[2J", b"NaN", b"\xff" * 8,
]  # fmt: skip
_VALUES = [
    None, True, -1, 0, 10**18, 10**400, 1e308, float("nan"), float("inf"), "", "nan", "../../x", "/etc", "E1",
    "E99999999999999999999999", "best_model.loss", "\x1b[31m", "\0", "x" * 5000, [], {}, [[]], {"": {}}, ["E4"],
]  # fmt: skip


def mutated(chance: random.Random, valid: bytes, other: bytes) -> bytes:
    """A content that is nearly `valid`."""
    data = valid
    if chance.random() < 0.5 and (changed := _as_json(chance, valid)) is not None:
        data = changed
    for _ in range(chance.choice((0, 1, 1, 1, 2, 4))):
        data = chance.choice(_CHANGES)(chance, data, other)
    return data


def _place(chance: random.Random, data: bytes) -> int:
    return chance.randrange(len(data) + 1)


def _flip(chance: random.Random, data: bytes, _: bytes) -> bytes:
    at = _place(chance, data)
    return data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]


def _insert(chance: random.Random, data: bytes, _: bytes) -> bytes:
    at = _place(chance, data)
    return data[:at] + chance.choice(_PIECES) + data[at + chance.choice((0, 0, 1, 8)) :]


def _cut(chance: random.Random, data: bytes, _: bytes) -> bytes:
    start, end = sorted((_place(chance, data), _place(chance, data)))
    return data[:start] + data[end:] if chance.random() < 0.5 else data[:end]


def _splice(chance: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: _place(chance, data)] + other[_place(chance, other) :]


def _number(chance: random.Random, data: bytes, _: bytes) -> bytes:
    at, size = _place(chance, data), chance.choice((2, 4, 8))
    value = chance.choice((0, 1, 255, 1 << 15, 1 << 31, (1 << 63) - 1)) % (1 << 8 * size)
    return data[:at] + value.to_bytes(size, "little") + data[at + size :]


def _payload(_chance: random.Random, _data: bytes, _other: bytes) -> bytes:
    return PAYLOAD


_CHANGES = (_flip, _flip, _insert, _insert, _cut, _splice, _number, _payload)


def _as_json(chance: random.Random, data: bytes) -> bytes | None:
    """Another value somewhere in the JSON of a line, of a whole file, or of the header of a safetensors file."""
    try:
        return json.dumps(_changed(chance, json.loads(data))).encode()
    except ValueError:
        pass
    if len(data) > 8 and 8 + (size := struct.unpack("<Q", data[:8])[0]) <= len(data):
        header = json.dumps(_changed(chance, json.loads(data[8 : 8 + size]))).encode()
        return struct.pack("<Q", len(header)) + header + data[8 + size :]
    lines = data.splitlines(keepends=True)
    at = chance.randrange(len(lines)) if lines else 0
    try:
        lines[at] = json.dumps(_changed(chance, json.loads(lines[at]))).encode() + b"\n"
    except (ValueError, IndexError):
        return None
    return b"".join(lines)


def _changed(chance: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(sorted(value))
        if chance.random() < 0.1:
            return {each: item for each, item in value.items() if each != key}
        if chance.random() < 0.1:
            return {**value, chance.choice(("", "../x", "\x1b", "best_model.loss", key * 2)): value[key]}
        return {**value, key: _changed(chance, value[key])}
    if isinstance(value, list) and value and chance.random() < 0.85:
        at = chance.randrange(len(value))
        return [*value[:at], _changed(chance, value[at]), *value[at + 1 :]]
    return chance.choice(_VALUES)

"""The lines of a ledger: an event as JSON, with a checksum. Pure."""

from __future__ import annotations

import json
import re
import zlib
from functools import lru_cache

from keepbest.run.event_parser import parse_event
from keepbest.run.events import Event, Observed, event_to_json

SENSELESS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
"""What a line that is no event makes `decode_line` raise."""

RESTORE = "restore the ledger from a copy of the run, or begin a new run in another directory"
"""What to do with a ledger that cannot be read."""

_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
_CHECKSUM = re.compile(rb',"crc":"([0-9a-f]{8})"\}\n')
_CHECKSUM_BYTES = len(b',"crc":"00000000"}\n')


def encode_line(event: Event) -> bytes:
    """The line of an event.

    Raises:
        ValueError, TypeError, LookupError, AttributeError, ArithmeticError: If it could not be read again.
    """
    if isinstance(event, Observed) and event.is_plain:
        # A quiet interval should cost next to nothing. The encoder would make the same of a known name and two numbers.
        body = f'{_opening(event.keeper)},"iteration":"{event.iteration}","value":{event.value!r}'.encode()
    else:
        text = _encode(event_to_json(event)).encode()
        parse_event(json.loads(text))
        body = text[:-1]
    return b'%b,"crc":"%08x"}\n' % (body, zlib.crc32(body))


@lru_cache(maxsize=64)
def _opening(keeper: str) -> str:
    return _encode({"event": Observed.name, "keeper": keeper})[:-1]


def decode_line(raw: bytes) -> Event:
    """The event of a whole line; `encode_line` is the inverse. Raises `SENSELESS` if it is none, or is damaged."""
    body, end = raw[:-_CHECKSUM_BYTES], _CHECKSUM.fullmatch(raw[-_CHECKSUM_BYTES:])
    if end is None:
        raise ValueError("it does not end with a checksum")
    if int(end[1], 16) != zlib.crc32(body):
        raise ValueError("its checksum does not match")
    return parse_event(json.loads(raw))

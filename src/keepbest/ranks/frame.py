"""What the ranks send each other in one exchange: a frame of a fixed size, equal in form on every rank."""

from __future__ import annotations

import hashlib
import struct
from typing import NamedTuple

from typing_extensions import Self

_LAYOUT = struct.Struct("<16s?Q?d?d5x")

FRAME_BYTES = _LAYOUT.size
"""Size of every frame."""


class Number(NamedTuple):
    """A number that one rank holds.

    Attributes:
        value: Value as a float64. `None` where the rank has none.
        weight: Weight as a float64. `None` where the rank has none.
        note: Text for the other ranks. It costs a second exchange if any rank has one.
    """

    value: float | None
    weight: float | None
    note: str = ""


class Frame(NamedTuple):
    """One rank's part of an exchange.

    Attributes:
        place: Digest of the step and of the state that must be equal on all ranks.
        failed: Whether this rank failed in the step.
        text_bytes: Length of the text that follows in a second exchange. 0 if this rank has none.
        value: Value of the rank's number.
        weight: Weight of the rank's number.
    """

    place: bytes
    failed: bool
    text_bytes: int
    value: float | None
    weight: float | None

    def pack(self) -> bytes:
        """Return the frame as bytes. Their number is the same for all frames."""
        return _LAYOUT.pack(
            self.place,
            self.failed,
            self.text_bytes,
            self.value is not None,
            0.0 if self.value is None else self.value,
            self.weight is not None,
            0.0 if self.weight is None else self.weight,
        )

    @classmethod
    def unpack(cls, raw: bytes) -> Self:
        """Return the frame that `pack` made into `raw`."""
        place, failed, text_bytes, has_value, value, has_weight, weight = _LAYOUT.unpack(raw)
        return cls(place, failed, text_bytes, value if has_value else None, weight if has_weight else None)


def digest_place(step: str, state: bytes) -> bytes:
    """Return the digest of a step and of the state that must be equal on all ranks there."""
    return hashlib.blake2b(step.encode(errors="surrogatepass") + b"\0" + state, digest_size=16).digest()

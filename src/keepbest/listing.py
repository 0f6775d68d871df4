"""Many names in one sentence: the first few of them, and how many more there are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def listed(names: Iterable[object], *, most: int = 6, separator: str = ", ") -> str:
    """The first `most` of the names, and how many more there are."""
    texts = list(map(str, names))
    shown = separator.join(texts[:most])
    return f"{shown} and {len(texts) - most} more" if len(texts) > most else shown


def listed_ranks(ranks: Sequence[int]) -> str:
    """Ranks in words: `rank 1`, or `ranks 0, 1`."""
    return f"rank{'s' if len(ranks) > 1 else ''} {listed(ranks)}"

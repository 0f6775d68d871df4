"""What differs between the places that ranks are in, without what is the same. Pure."""

from __future__ import annotations

from collections.abc import Sequence

SEPARATOR = "\x1f"
"""Between the step of a rank and the state that must be equal on all ranks."""

_SHOWN = 600  # characters of what one rank has
_OPENING, _CLOSING, _QUOTES = "([{", ")]}", "'\""


def describe_difference(places: Sequence[str]) -> str:
    """Describe the places of ranks, by rank: a step, and after the separator a state of words such as `name=value`.

    Ranks with the same share a line.
    """
    steps, states = zip(
        *((step, state) for step, _, state in (place.partition(SEPARATOR) for place in places)), strict=True
    )
    if len(set(steps)) > 1:
        return f"the ranks are not in the same step:\n{_lines(steps)}"
    return f"the ranks differ in step '{steps[0]}':\n{_lines(_different_words(states))}"


def _lines(texts: Sequence[str]) -> str:
    ranks: dict[str, list[str]] = {}
    for rank, text in enumerate(texts):
        ranks.setdefault(text, []).append(str(rank))
    return "\n".join(
        f"  rank {', '.join(who)}: {text[:_SHOWN]}{' ...' if len(text) > _SHOWN else ''}" for text, who in ranks.items()
    )


def _different_words(texts: Sequence[str]) -> list[str]:
    """What is left of texts without the words that all of them have in the same place, from either end if need be."""
    rows = [_words(text) for text in texts]
    if len(set(map(len, rows))) == 1:
        columns = [column for column in zip(*rows, strict=True) if len(set(column)) > 1]
        return [" ".join(column[rank] for column in columns) or "nothing" for rank in range(len(texts))]
    shortest = min(map(len, rows))
    start = next((place for place in range(shortest) if len({row[place] for row in rows}) > 1), shortest)
    end = next(
        (place for place in range(shortest - start) if len({row[-1 - place] for row in rows}) > 1), shortest - start
    )
    return [" ".join(row[start : len(row) - end]) or "nothing" for row in rows]


def _words(text: str) -> list[str]:
    """Split at the spaces outside of brackets and quotes."""
    words, word, depth, quote = [], "", 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in _QUOTES:
            quote = character
        depth += (character in _OPENING) - (character in _CLOSING) if not quote else 0
        if character == " " and depth <= 0 and not quote:
            words.append(word)
            word = ""
        else:
            word += character
    return [*words, word]

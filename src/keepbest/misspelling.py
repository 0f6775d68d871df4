"""Whether a metric that was not logged is the misspelling of one that was."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches

from keepbest.metric_properties import HIGHER_IS_BETTER, LOWER_IS_BETTER, words_of

# Of a word with one letter too many or too few, from three letters on. `loss` and `loose` are less alike.
_ALIKE = 0.85
_VALIDATION = frozenset({"val", "valid", "validation"})
_SPLITS = _VALIDATION | {"train", "training", "test", "eval", "dev"}
# Lightning appends it where there are several sets for validation.
_SET = "/dataloader_idx_"


def misspelt(metric_key: str, logged: Iterable[str]) -> str | None:
    """Return the logged name that is meant by `metric_key`, or `None` if that may as well be another metric.

    Two names are of one metric if their words are the same, with any signs between them, or if two words have changed
    places, one of which names a split, or if one word is misspelt. `rmse` is no misspelling of `mse`, nor `acc5` of
    `acc1`.
    """
    return next((name for name in sorted(logged) if _is_same(metric_key, name)), None)


def nearest(metric_key: str, logged: Iterable[str]) -> str:
    """Return a question to append to an error, or nothing where no name is near."""
    names = sorted(logged)
    near = misspelt(metric_key, names) or next(iter(get_close_matches(metric_key, names, n=1)), None)
    return "" if near is None else f"; did you mean {near!r}?"


def _is_same(key: str, name: str) -> bool:
    mine, theirs = words_of(key), words_of(name.partition(_SET)[0])
    if "".join(mine) == "".join(theirs) and (mine == theirs or not any(map(str.isdigit, "".join(mine)))):
        return True
    if len(mine) != len(theirs):
        return False
    if len(mine) == 2 and mine == theirs[::-1]:
        return not _SPLITS.isdisjoint(mine)  # `en_de` and `de_en` are two metrics
    different = [pair for pair in zip(mine, theirs, strict=True) if pair[0] != pair[1]]
    return len(different) == 1 and _is_misspelling(*different[0])


def _is_misspelling(word: str, of: str) -> bool:
    if {word, of} <= _VALIDATION:
        return True
    known = LOWER_IS_BETTER | HIGHER_IS_BETTER
    if word in known or not word.isalpha() or word[0] != of[0]:
        return False
    if of not in known and (f"{word}s" == of or f"{of}s" == word):  # of one, and of several
        return False
    return SequenceMatcher(None, word, of).ratio() >= _ALIKE

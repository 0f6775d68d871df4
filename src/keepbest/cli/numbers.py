"""Numbers as they are written in a command. Pure."""

from __future__ import annotations

import re

from keepbest.errors import ConfigError

_MOST = 1000
_NUMBER = r"\d{1,18}"


def parse_numbers(text: str, what: str) -> list[int]:
    """Return the numbers that a text like `0..20` or `1,2,5` names.

    Args:
        text: Text.
        what: Name of the numbers, for the error.

    Raises:
        ConfigError: If it has another form, or names too many.
    """
    if bounds := re.fullmatch(rf"({_NUMBER})\.\.({_NUMBER})", text, re.ASCII):
        numbers = range(int(bounds[1]), int(bounds[2]) + 1)
        found = list(numbers[: _MOST + 1])
    elif re.fullmatch(rf"{_NUMBER}(,{_NUMBER})*", text, re.ASCII):
        found = sorted({int(number) for number in text.split(",")})
    else:
        raise ConfigError(f"{what} must be like 0..20 or 1,2,5, got {text!r}")
    if not 0 < len(found) <= _MOST:
        raise ConfigError(f"expected 1 to {_MOST} {what}: {text!r}")
    return found


def parse_top(text: str) -> tuple[str | None, list[int]]:
    """Return the keeper, or `None`, and the places that a text like `top=1..5` or `best_model.loss.top=1,3` names.

    Raises:
        ConfigError: If it has another form, or names too many.
    """
    found = re.fullmatch(r"(?:(.+)\.)?top=([^=]*)", text)
    if found is None:
        raise ConfigError(f"expected places among the best, like top=1..5 or best_model.loss.top=1..5, got {text!r}")
    return found[1], parse_numbers(found[2], "places")

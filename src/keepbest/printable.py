"""Text that may be from anybody, made fit for a terminal, a log or a page. Pure."""

from __future__ import annotations


def printable(text: str, *, keep: str = "") -> str:
    """`text` with escapes in the place of what is not printed: control characters, and what reorders.

    Args:
        text: Text.
        keep: Control characters that stay.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in keep else _escaped(each) for each in text)


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode()

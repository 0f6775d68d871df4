"""Text that may be from anybody, made fit for a terminal, a log or a page. Pure."""

from __future__ import annotations

import re

# Of a URL that lost a slash as a `Path`, too. A password may have slashes in it, as those of AWS do; a port may not.
_PASSWORD = re.compile(r"(:/{1,2}[^\s/@:'\"]*):(?!\d+(?:/|$))[^\s'\"]+@")
_SECRET = re.compile(
    r"([?&;][^\s=&;'\"]*(?:token|secret|passw|pwd|key|sig|cred|auth)[^\s=&;'\"]*=)[^\s&;'\"]+", re.IGNORECASE
)


def without_passwords(text: str) -> str:
    """`text` with stars in the place of passwords in URLs, and of parts of a query that are named like one.

    This decides alone what is secret: what it would change is also refused as the URL of a run.
    """
    if ":/" not in text:
        return text
    return _SECRET.sub(r"\1***", _PASSWORD.sub(r"\1:***@", text))


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

"""Text that may be from anybody, made fit for a terminal, a log or a page. Pure."""

from __future__ import annotations

import re

# Of a URL that lost a slash as a `Path`, too. A name may have an @ in it, as an address does. A password may have a
# slash in it, as those of AWS do; a port may not. The limits keep the time short for texts of any length.
_PASSWORD = re.compile(r"(:/{1,2}[^\s/:\['\"]{0,500}):(?!\d+(?:/|$))[^\s'\"]{1,2000}@")
_QUERY = re.compile(r"([?&;]([^\s?=&;'\"]{1,500})=)[^\s&;'\"]+")
_SECRET = re.compile("token|secret|passw|pwd|key|sig|cred|auth", re.IGNORECASE)


def without_passwords(text: str) -> str:
    """`text` with stars in the place of passwords in URLs, and of parts of a query that are named like one.

    This decides alone what is secret: what it would change is also refused as the URL of a run.
    """
    if ":/" not in text:
        return text
    return _QUERY.sub(_hidden, _PASSWORD.sub(r"\1:***@", text))


def _hidden(setting: re.Match[str]) -> str:
    return f"{setting[1]}***" if _SECRET.search(setting[2]) else setting[0]


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

"""Renders the table of docs/settings.md from the settings themselves: `python -m docs.settings_table` writes it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from keepbest.settings import KeeperSettings

PAGE = Path(__file__).with_name("settings.md")


def render_table() -> str:
    """A row for each setting: name, type, default, and the sentence that describes it."""
    hints = get_type_hints(KeeperSettings)
    rows = [
        f"| `{name}` | {_type(hints[name])} | {_value(field.default)} | {field.description} |"
        for name, field in KeeperSettings.model_fields.items()
    ]
    return "\n".join(["| setting | type | default | what it does |", "|---|---|---|---|", *rows, ""])


def with_table(page: str) -> str:
    """`page`, with its only table made anew."""
    return re.sub(r"(^\|.*\n)+", lambda _: render_table(), page, count=1, flags=re.MULTILINE)


def _type(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_type, get_args(hint)))
    if get_origin(hint) is Literal:
        return ", ".join(map(_value, get_args(hint)))
    if get_origin(hint) is Sequence:
        return f"list of {_type(get_args(hint)[0])}"
    return "`None`" if hint is NoneType else f"`{hint.__name__}`"


def _value(value: Any) -> str:
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))

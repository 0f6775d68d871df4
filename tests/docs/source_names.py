"""The names that the sources define, to compare with those that a page speaks of."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from tests.docs.blocks import ROOT

PACKAGE = ROOT / "src" / "keepbest"


@cache
def modules() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


@cache
def classes() -> dict[str, set[str]]:
    """Every class of the sources, with the names of its methods and attributes."""
    found: dict[str, set[str]] = {}
    for tree in modules().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, set()).update(_names_in(node))
    return found


@cache
def words() -> set[str]:
    """Every word of the sources and of the kit of the tests."""
    paths = [*modules(), *(ROOT / "tests" / "kit").glob("*.py")]
    return {word for path in paths for word in re.findall(r"\w+", path.read_text())}


def missing_names(spoken_of: Iterable[str]) -> set[str]:
    """Of these words those that look like names of code and are none of the sources'."""
    return {word for word in spoken_of if not _is_there(word.strip("."))}


def _is_there(word: str) -> bool:
    first, dot, attribute = word.partition(".")
    if re.fullmatch(r"[A-Z]\w*", first) and dot:
        return attribute in classes().get(first, set())
    looks_like_a_name = "_" in word or re.fullmatch(r"[A-Z][a-z]+[A-Z]\w*", word)
    return not looks_like_a_name or word in words()


def _names_in(node: ast.ClassDef) -> set[str]:
    names = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
    return names | {each.target.id for each in node.body if isinstance(each, ast.AnnAssign)}

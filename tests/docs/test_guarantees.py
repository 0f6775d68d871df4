"""Every promise of the guarantees names tests that are there."""

from __future__ import annotations

import re

from tests.docs.blocks import ROOT

TEXT = (ROOT / "docs" / "guarantees.md").read_text()


def test_guarantees_name_tests_that_exist():
    named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", TEXT)
    assert len(named) > 30
    missing = []
    for path, name in named:
        file = ROOT / "tests" / path
        if not file.exists() or (name and f"def {name}(" not in file.read_text()):
            missing.append((path, name))
    assert missing == []

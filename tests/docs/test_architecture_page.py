"""The map shows what is there: packages, signatures, names, and what each call costs."""

from __future__ import annotations

import inspect
import re
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from keepbest import BestKeeper, TrainingIteration, load
from tests.docs.blocks import ROOT
from tests.docs.source_names import PACKAGE, missing_names
from tests.kit.pool import run_ranks
from tests.test_architecture import SHELLS

TEXT = (ROOT / "docs" / "architecture.md").read_text()
CODE = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL))


def test_page_names_every_package():
    there = {path.name for path in PACKAGE.glob("*.py")}
    there |= {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    assert sorted(re.findall(r"^- `([\w./]+)`: ", TEXT, flags=re.MULTILINE)) == sorted(there)


def test_page_names_every_shell():
    named = re.search(r"never a shell \((.*?)\)", TEXT, flags=re.DOTALL)[1]
    assert re.findall(r"`(\w+)`", named) == SHELLS


def test_page_names_every_module_of_the_large_packages():
    section = re.search(r"^## Inside the two large packages$(.*?)^## ", TEXT, flags=re.MULTILINE | re.DOTALL)[1]
    for package in ("capture", "run"):
        there = {path.stem for path in (PACKAGE / package).glob("*.py")} - {"__init__"}
        [listed] = re.findall(rf"`{package}/`[^:]*:\n\n((?:[- ] .*\n)+)", section)
        assert set(re.findall(r"`(\w+)`", listed)) == there


def test_signatures_of_the_tour_are_those_of_the_sources():
    rows = re.findall(r"^\| `([\w.]+)\((.*)\) -> (.+)` \| `([\w/]+)\.py` \|", TEXT, flags=re.MULTILINE)
    assert len(rows) == TEXT.count("` | `")
    for name, parameters, returned, file in rows:
        found = import_module("keepbest." + file.replace("/", "."))
        for attribute in name.split("."):
            found = getattr(found, attribute)
        signature = inspect.signature(found)
        assert parameters == ", ".join(parameters_of(signature)), name
        assert returned == signature.return_annotation, name


def parameters_of(signature: inspect.Signature) -> list[str]:
    """The names, without `self`, and a `*` before those that are keywords only."""
    kinds = {name: each.kind for name, each in signature.parameters.items() if name != "self"}
    keywords = [name for name, kind in kinds.items() if kind is inspect.Parameter.KEYWORD_ONLY]
    return [*(name for name in kinds if name not in keywords), *(["*", *keywords] if keywords else [])]


def test_page_speaks_of_names_and_files_that_are_there():
    code = [each for each in CODE if "/" not in each and ".py" not in each]
    assert missing_names(word for each in code for word in re.findall(r"[A-Za-z_.][\w.]*", each)) == set()
    files = {code for code in CODE if re.fullmatch(r"[\w/]+\.py", code)}
    assert [file for file in files if not ((PACKAGE / file).exists() or (ROOT / file).exists())] == []


SETTINGS = {
    "waited for": {},
    "background": {"async_save": True},
    "dcp": {"format": "dcp"},
    "dcp in the background": {"format": "dcp", "async_save": True},
}


def count_collectives(folder: Path) -> dict[str, int]:
    """What each call of the table costs on this rank."""
    costs: dict[str, int] = {}
    for name, settings in SETTINGS.items():
        model = nn.Linear(2, 2)
        with torch.no_grad():
            model.weight.fill_(1.0)
            model.bias.fill_(1.0)
        keeper = BestKeeper(model, directory=folder / name, metric_key="loss", **settings)
        control = keeper._ranks._control
        calls = {
            "start": keeper.start,
            "best": lambda keeper=keeper: keeper.observe(3.0, TrainingIteration(update=1)),
            "next best": lambda keeper=keeper: keeper.observe(2.0, TrainingIteration(update=2)),
            "quiet": lambda keeper=keeper: keeper.observe(4.0, TrainingIteration(update=3)),
            "flush": partial(keeper.flush, pin="a tag"),
            "release": lambda keeper=keeper: keeper.release("a tag"),
            "load": lambda name=name, model=model: load(folder / name, "best_model.loss", model),
            "close": keeper.close,
        }
        for call, make in calls.items():
            before = control.round
            make()
            costs[f"{call} {name}"] = control.round - before
    return costs


def test_costs_are_those_of_a_run_on_two_ranks(tmp_path):
    cost = run_ranks(count_collectives, 2, tmp_path)[0]
    rows = re.findall(r"^\| (`.*?) \| (\d+) \| .*\|$", TEXT, flags=re.MULTILINE)
    assert {call: int(number) for call, number in rows} == {
        "`observe`, quiet interval": cost["quiet waited for"],
        "`observe`, a save that is waited for": cost["best waited for"],
        "`observe`, a save in the background": cost["best background"],
        "`observe`, the first save with `dcp`": cost["best dcp"],
        "`observe`, another save with `dcp`": cost["next best dcp"],
        "`observe`, another save with `dcp` in the background": cost["next best dcp in the background"],
        "`start`": cost["start waited for"],
        "`start` with `dcp`": cost["start dcp"],
        "`flush`": cost["flush waited for"],
        "`release`": cost["release waited for"],
        "`close`": cost["close waited for"],
        "`load`": cost["load waited for"],
        "`load` with `dcp`": cost["load dcp"],
    }
    assert cost["quiet background"] == cost["quiet dcp"] == 1

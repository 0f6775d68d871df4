"""Every code block of the pages does what it says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from keepbest import BestKeeper, TrainingIteration
from keepbest.cli.app import app
from keepbest.cli.run_file import RunFile
from keepbest.run.history import History
from keepbest.run.ledger import read_ledger
from keepbest.run.lines import encode_line
from keepbest.run.manifest import Manifest
from tests.docs import commands, transcripts
from tests.docs.blocks import ALL, PAGES, ROOT, Block
from tests.docs.commands import command_lines
from tests.docs.preludes import BEFORE_A_BLOCK, BEFORE_THE_PAGE, ENDS_WITH, NEEDS
from tests.docs.rules import RULES, rules_of
from tests.docs.run_python import run_steps
from tests.docs.source_names import missing_names
from tests.kit import cli_runs as runs
from tests.kit.pool import run_ranks
from tests.kit.toys import AutoEncoder
from tests.test_architecture import PATH


def claimed(rule: str, page: str | None = None) -> list[Block]:
    return [block for block in ALL if rules_of(block) == [rule] and page in (None, block.page)]


def pages_with(*rules: str) -> list[str]:
    return [page for page in PAGES if any(claimed(rule, page) for rule in rules)]


def blocks_of(rule: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("block", claimed(rule), ids=str)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The present folder, in which examples/ is where it is in the repository."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_files(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the page shows; what it imports of them is forgotten after the test."""
    monkeypatch.syspath_prepend(folder)
    for block in claimed("file", page):
        (folder / block.file_name).write_text(block.text)
        monkeypatch.setitem(sys.modules, Path(block.file_name).stem, None)
        monkeypatch.delitem(sys.modules, Path(block.file_name).stem)


@pytest.mark.parametrize("block", ALL, ids=str)
def test_block_is_claimed_by_one_rule(block):
    assert len(rules_of(block)) == 1, f"{block} ({block.language or 'no language'}): {rules_of(block)} of {list(RULES)}"


def test_preludes_are_for_blocks_that_are_there():
    count = {
        (page, heading): sum(block.heading == heading for block in claimed("python", page))
        for page, headings in BEFORE_A_BLOCK.items()
        for heading in headings
    }
    assert count == {
        (page, name): len(codes) for page, names in BEFORE_A_BLOCK.items() for name, codes in names.items()
    }
    assert set(BEFORE_THE_PAGE) <= set(pages_with("python"))


@pytest.mark.parametrize("page", pages_with("python"))
def test_python(page, folder):
    for package in NEEDS.get(page, ()):
        pytest.importorskip(package, reason=f"{page} needs {package}: pip install 'keepbest[{package}]'")
    steps = [{"file": "prelude", "line": 1, "text": BEFORE_THE_PAGE.get(page, ""), "ends_with": None}]
    preludes = {heading: iter(codes) for heading, codes in BEFORE_A_BLOCK.get(page, {}).items()}
    for block in claimed("python", page):
        assert not block.has_gaps, f"{block} leaves something out"
        prelude = next(preludes.get(block.heading, iter([])), "")
        steps.append({"file": f"before {block}", "line": 1, "text": prelude, "ends_with": None})
        ends_with = ENDS_WITH.get(page, {}).get(block.heading)
        steps.append({"file": str(ROOT / page), "line": block.line, "text": block.text, "ends_with": ends_with})
    run_ranks(run_steps, 1, steps, folder, init=False, timeout=120)


def test_commands(folder):
    """Those of all pages that bring no files: they are about the example, and what two pages run is run once."""
    pages = [page for page in pages_with("commands") if page not in pages_with("file")]
    lines = [words for page in pages for block in claimed("commands", page) for words in command_lines(block.text)]
    for number, words in enumerate(lines):
        if words not in lines[:number]:
            commands.check(words, folder)


@pytest.mark.parametrize("page", pages_with("file"))
def test_file(page, folder, monkeypatch):
    """The files of a page, and the commands that use them."""
    write_files(page, folder, monkeypatch)
    for block in claimed("file", page):
        if block.language == "yaml":
            RunFile.read(folder / block.file_name, {})
        else:
            assert not block.has_gaps, f"{block} leaves something out"
    for block in claimed("commands", page):
        for words in command_lines(block.text):
            commands.check(words, folder)


@blocks_of("callbacks")
def test_callbacks(block, folder, monkeypatch):
    write_files(block.page, folder, monkeypatch)
    shown = yaml.safe_load(block.text)["callbacks"]
    of_page = folder / "line.yaml"
    if of_page.exists():  # its callbacks are about its model
        content = {**yaml.safe_load(of_page.read_text()), "directory": str(folder / "run")}
        content["trainer"]["callbacks"] = shown
    else:
        content = runs.describe_run(folder / "run", epochs=4)
        content["data"]["test"] = {"kind": "tests.kit.toys.Waves", "length": 9, "phase": 1.0}
        content["trainer"]["callbacks"] = [runs.evaluation(every_n_updates=None, every_n_epochs=1), *shown]
    printed = commands.run_here(["train", str(runs.write_config(folder / "run.yaml", content))])

    logged = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    for callback in shown:
        if "within" in callback:
            assert {"best_model.accuracy.val"} == runs.checkpoints(folder / "run").keys()
            assert sum(0 <= line.get("accuracy/val", -1) <= 1 for line in logged) == content["trainer"]["epochs"]
        elif "metric_key" in callback and "tolerances" in callback:
            names = {runs.BEST, *(f"{runs.BEST}.tolerance={number}" for number in callback["tolerances"])}
            kept = runs.checkpoints(folder / "run")
            assert kept.keys() == names
            assert {file for each in kept.values() for file in each.files} == {f"{callback['model_names'][0]}.pt"}
            assert any("best=loss.val.total/loss/test/total" in line for line in logged) == (
                "eval_callbacks" in callback
            )
            assert bool(re.search(r"^new best \d", printed, flags=re.MULTILINE)) == ("on_new_best" in callback)


@blocks_of("noether")
def test_noether(block):
    schemas = pytest.importorskip("noether.core.schemas", reason="noether is not installed", exc_type=ImportError)
    shown = yaml.safe_load(block.text)["trainer"]["callbacks"]
    others = {"kind": "any", "max_epochs": 1, "effective_batch_size": 1, "add_default_callbacks": False}
    read = schemas.BaseTrainerConfig(callbacks=shown, **others).callbacks
    assert [each.kind for each in read] == [each["kind"] for each in shown]
    assert (read[1].metric_key, read[1].tolerances, read[1].async_save) == ("loss/val/total", [2, 5], True)


@blocks_of("requeue")
def test_requeue(block, folder):
    """With an srun that knows the options that the script of launch/ gives, and ends as ranks do that were stopped."""
    script = (ROOT / "launch" / "slurm_requeue.sbatch").read_text()
    line = re.search(r"^srun (.*)", block.text, flags=re.MULTILINE)[1]
    assert [word for word in line.split() if word.startswith("-") and word != "-m" and word not in script] == []
    srun = folder / "srun"
    for status, expected in ((75, "start this again\n"), (0, ""), (1, "")):
        srun.write_text(f"#!/bin/sh\nexit {status}\n")
        srun.chmod(0o755)
        environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "CONFIG": "config.yaml"}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout == expected


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """What the example keeps."""
    directory = tmp_path_factory.mktemp("digits") / "run"
    config = ROOT / "examples" / "digits" / "config.yaml"
    runs.succeeded(runs.train_on_ranks(1, config, "trainer.strategy=single", f"directory={directory}"))
    return runs.checkpoints(directory)


def test_session(digits):
    for block in claimed("session"):
        transcripts.check_session(block.text, digits)


@blocks_of("tree")
def test_tree(block, folder):
    """A run with these iterations leaves these files."""
    model = AutoEncoder()
    with BestKeeper(model, directory="runs/a", metric_key="loss/val/total", tolerances=[2]) as keeper:
        for epoch, value in enumerate([5.0, 4.0, 3.0, 3.5, 3.5, 3.5, 2.0], start=1):
            keeper.observe(value, TrainingIteration(epoch=epoch, update=20 * epoch, sample=1280 * epoch))
    root, *lines = block.text.splitlines()
    shown: dict[str, set[str] | str] = {}
    for line in lines:
        name, *rest = line.split()
        shown[name] = rest[1] if rest[0] == "->" else set(rest) if name.endswith("/") else ""
    checkpoints = folder / root
    for name, content in shown.items():
        path = checkpoints / name
        assert path.exists(), f"there is no {name}"
        if isinstance(content, set):
            assert {each.name for each in path.iterdir()} == content
        elif content:
            assert str(path.readlink()) == content
    assert {each.name for each in checkpoints.iterdir()} == {name.partition("/")[0] for name in shown}


@blocks_of("picture")
def test_picture(block):
    assert missing_names(re.findall(r"[A-Za-z_.]+", block.text)) == set()


@blocks_of("path")
def test_path(block):
    assert block.text.split() == PATH


@blocks_of("ledger")
def test_ledger(block, folder):
    (folder / "ledger.jsonl").write_text(block.text)
    events, whole = read_ledger(folder / "ledger.jsonl")
    assert whole == len(block.text)
    assert b"".join(map(encode_line, events)).decode() == block.text
    assert History.of(events).refs == {"best_model.loss": "E1", "best_model.loss.tolerance=2": "E1"}


@blocks_of("manifest")
def test_manifest(block):
    assert Manifest.from_bytes(block.text.encode()).to_bytes().decode() == block.text.strip()


@blocks_of("timeout")
def test_timeout(block):
    transcripts.check_timeout(block.text)


@blocks_of("torchrun_log")
def test_torchrun_log(block):
    transcripts.check_torchrun_log(block.text)


def test_every_rule_has_a_test_and_something_to_do():
    assert [name for name in RULES if not claimed(name)] == []
    assert [name for name in RULES if f"test_{name}" not in globals()] == []


def test_table_of_commands_is_what_help_says():
    said = re.findall(
        r"^\| `([\w-]+) .*?` \| (.*) \|$", (ROOT / "docs" / "reference.md").read_text(), flags=re.MULTILINE
    )
    assert said == [
        (name, command.help.splitlines()[0]) for name, command in typer.main.get_command(app).commands.items()
    ]

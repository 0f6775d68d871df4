"""Tables on terminals of any width, and in files: no name and no number is ever cut off."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from keepbest import open_run
from keepbest.cli.app import app
from tests.kit import cli_runs as runs
from tests.kit.runs import Run

METRIC = "loss/val/classification/of_the_second_task"
BEST = METRIC.replace("/", ".")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("of runs") / "run", metric_key=METRIC, tolerances=[1, 7], keep_top_k=2)
    with run.keeper:
        run.observe(5.123456789, 4.0, 4.5, 6.0, 3.14159265)
    return run.keeper.directory


def on_terminal(width, *arguments):
    """What a terminal of that width shows, without its colours."""
    shown = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": str(width), "FORCE_COLOR": "1"})
    assert shown.exit_code == 0, shown.output
    return re.sub(r"\x1b\[[0-9;]*m", "", shown.output)


@pytest.mark.parametrize("width", [40, 80, 120, 160, 220])
def test_terminal_of_any_width_shows_every_cell(directory, width):
    shown = on_terminal(width, "show", directory)
    words = shown.replace(";", " ").split()
    for ref, each in open_run(directory).refs.items():
        cells = [ref, f"{each.value:.9g}", each.iteration, f"{each.bytes:,}", each.digest[:12], *each.files]
        assert [cell for cell in cells if cell not in words] == []
    assert "…" not in shown


@pytest.mark.parametrize("command", [["tolerance", "0..9"], ["show", "--history"]], ids=" ".join)
def test_narrow_terminal_shows_every_number(directory, command):
    name, *others = command
    shown = on_terminal(80, name, directory, *others)
    assert shown.count(f"best_model.{BEST}\n") == 1
    assert all(f"value: {text}; " in shown for text in ("4", "3.14159265"))
    assert max(map(len, shown.splitlines()[1:])) <= 80


def test_file_has_a_line_for_each_ref(directory):
    lines = runs.keepbest("show", directory).stdout.splitlines()
    for ref, each in open_run(directory).refs.items():
        [line] = [line for line in lines if line.split()[:1] == [ref]]
        assert line.split()[-1] == each.digest[:12]
        assert ("not exceeded (provisional)" in line) == (each.tolerance == 7)


@pytest.mark.parametrize("width", [80, 220])
def test_title_is_one_line_and_numbers_stand_below_each_other(directory, width):
    title, _, headings, _, row, *_ = on_terminal(width, "show", directory.parent).splitlines()
    assert title == f"best_model.{BEST} in {directory.parent}: {METRIC}, lower is better"
    for heading, number in (("observations", "5"), ("intervals since best", "0")):
        end = headings.index(heading) + len(heading)
        assert row[:end].endswith(f" {number}")


@pytest.mark.parametrize("command", [["show"], ["show", "--history"], ["tolerance"]], ids=" ".join)
def test_letters_that_an_output_has_not_are_escaped(command, tmp_path):
    run = Run(tmp_path / "größe" / "损失", metric_key="损失/é", higher_is_better=False)
    with run.keeper:
        run.observe(2.5)
    name, *others = command
    for directory in (run.keeper.directory, run.keeper.directory.parent)[: 2 if command == ["show"] else 1]:
        shown = CliRunner(charset="latin-1").invoke(app, [name, str(directory), *others])
        assert shown.exit_code == 0, shown.output
        assert r"größe" in shown.output
        assert r"\u635f\u5931" in shown.output


@pytest.mark.parametrize("closed", [1, 2])
def test_command_ends_well_where_an_output_is_closed(closed, directory):
    command = [sys.executable, "-m", "keepbest", "show", str(directory)]
    ended = subprocess.run(["sh", "-c", f'exec "$@" {closed}>&-', "sh", *command], capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert (BEST.encode() in ended.stdout) == (closed == 2)

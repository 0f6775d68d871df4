"""The runs of a folder, the best first."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from keepbest.reading.sweep import find_runs
from tests.kit import cli_runs as runs
from tests.kit.runs import Run

LOSS, ACCURACY = "best_model.loss", "best_model.accuracy"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four runs at several depths, one of them with a second metric, one that kept nothing, and one damaged ledger."""
    folder = tmp_path_factory.mktemp("runs")
    with Run(folder / "b").keeper as loss, Run(folder / "b", metric_key="accuracy").keeper as accuracy:
        loss.observe(2.0, update=1)
        accuracy.observe(0.7, update=1)
    for name, values in {"deep/day/a": [3.0, 1.0, 4.0], "c": [9.0], "nan": [math.nan]}.items():
        run = Run(folder / name)
        with run.keeper:
            run.observe(*values)
    with Run(folder / "d", metric_key="accuracy").keeper as accuracy:
        accuracy.observe(0.9, update=1)
    (folder / "broken" / "checkpoints").mkdir(parents=True)
    (folder / "broken" / "checkpoints" / "ledger.jsonl").write_text("nonsense\n")
    (folder / "link").symlink_to(folder / "c")
    (folder / "notes").mkdir()
    return folder


def test_runs_of_a_folder_are_ranked_by_keeper_and_direction(folder):
    shown = json.loads(runs.keepbest("show", folder, "--json").stdout)
    ranked = [(each["keeper"], each["place"], each["run"], each["value"], each["iteration"]) for each in shown]
    assert ranked == [
        (ACCURACY, 1, "d", 0.9, "U1"),
        (ACCURACY, 2, "b", 0.7, "U1"),
        (LOSS, 1, "deep/day/a", 1.0, "U2"),
        (LOSS, 2, "b", 2.0, "U1"),
        (LOSS, 3, "c", 9.0, "U1"),
        (LOSS, None, "nan", None, None),
        (None, None, "broken", None, None),
    ]
    assert [each["intervals_since_best"] for each in shown if each["run"] == "deep/day/a"] == [1]
    assert {each["state"] for each in shown if each["keeper"]} == {"ended"}
    assert "line 1" in shown[-1]["error"]


def test_table_of_runs_says_the_direction_and_what_is_damaged(folder):
    ended = runs.keepbest("show", folder)
    assert (ended.exit_code, ended.stderr) == (0, "")
    text = " ".join(ended.stdout.split())
    assert f"{ACCURACY} in {folder}: accuracy, higher is better" in text
    assert f"{LOSS} in {folder}: loss, lower is better" in text
    assert re.findall(r"^ *(\S+) +\S+ .*ended", ended.stdout, re.MULTILINE) == ["d", "b", "deep/day/a", "b", "c", "nan"]
    assert "broken cannot be read: " in text


def test_run_that_trains_is_in_use_and_an_interrupted_one_open(tmp_path):
    with Run(tmp_path / "stopped").keeper as keeper:
        keeper.observe(1.0, update=1)
        keeper.abandon()
    with Run(tmp_path / "live").keeper as keeper:
        keeper.observe(2.0, update=1)
        shown = json.loads(runs.keepbest("show", tmp_path, "--json").stdout)
    assert [(each["run"], each["state"]) for each in shown] == [("stopped", "open"), ("live", "in use")]


def test_folder_without_runs_is_an_error(tmp_path):
    ended = runs.keepbest("show", tmp_path)
    assert (ended.exit_code, "is not the directory of a run" in ended.stderr) == (1, True)


def test_folder_that_is_removed_meanwhile_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    (run := tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (run / "ledger.jsonl").touch()
    listed = Path.iterdir

    def list_after_removal(path):
        if path.name == "gone":
            path.rmdir()
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", list_after_removal)  # nothing else comes between two looks at a folder
    assert find_runs(tmp_path) == [tmp_path / "run"]

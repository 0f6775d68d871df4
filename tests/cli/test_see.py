"""To see a run: what any patience would have kept, the picture, and the report."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree as ET

import pytest

from keepbest import open_run
from keepbest.cli.numbers import parse_numbers
from keepbest.errors import ConfigError
from tests.kit import cli_runs as runs
from tests.kit.runs import Run, refs, update

BEST = "best_model.loss"
VALUES = [5.0, 4.0, 4.5, 6.0, math.nan, 3.0, 3.5, 3.25, 3.1]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Observed to the end, with a part in the middle that was done twice."""
    directory = tmp_path_factory.mktemp("seen") / "<run>"
    first = Run(directory, tolerances=[1, 7])
    with first.keeper:
        first.observe(*VALUES[:3])
        first.keeper.flush(pin="third")
        state = first.keeper.state_dict()
        first.observe(3.5, 7.0, first=4)
    again = Run(directory, tolerances=[1, 7])
    again.keeper.load_state_dict(state)
    with again.keeper:
        again.observe(*VALUES[3:], first=4)
    return directory


def by_hand(tolerance):
    """(value and number of what is kept, when it was exceeded), from nothing but the values."""
    best, best_at, drought = math.inf, None, 0
    for number, value in enumerate(VALUES, start=1):
        if value < best:
            best, best_at, drought = value, number, 0
        else:
            drought += 1
        if drought > tolerance:
            return best, best_at, number
    return best, best_at, None


def test_ledger_tells_what_any_tolerance_would_have_kept(directory):
    for answer in open_run(directory).tolerances(range(12)):
        value, number, exceeded_at = by_hand(answer.tolerance)
        assert (answer.keeper, answer.value, answer.iteration) == (BEST, value, f"U{number}")
        assert answer.exceeded_at == (None if exceeded_at is None else f"U{exceeded_at}")
    assert refs(directory)[f"{BEST}.tolerance=1"] == "U2"


def test_tolerance_command_tells_which_weights_are_there(directory):
    lines = runs.keepbest("tolerance", directory, "0,1,5").stdout.splitlines()
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines if line.strip().startswith(BEST)]
    assert rows == [
        [BEST, "0", "4", "U2", "U3", "snapshots/U2"],
        [BEST, "1", "4", "U2", "U4", "snapshots/U2"],
        [BEST, "5", "3", "U6", "not exceeded", "snapshots/U6.r1"],
    ]


@pytest.mark.parametrize("text", ["", "a", "3..", "5..2", "1,,2", "-1", "0..1000"])
def test_tolerances_that_make_no_sense_are_refused(text):
    with pytest.raises(ConfigError, match="tolerances"):
        parse_numbers(text, "tolerances")


def test_curve_shows_the_timeline_abandoned_ones_and_restarts(directory):
    [curve] = open_run(directory).curves()
    assert [repr(point.value) for point in curve.points] == [repr(value) for value in VALUES]
    assert [curve.position(point.iteration) for point in curve.points if point.is_new_best] == [1, 2, 6]
    assert [[point.value for point in beyond] for beyond in curve.abandoned] == [[3.5, 7.0]]
    assert curve.restarts == [update(3)]


def test_picture_has_the_curve_the_marks_and_the_legend(directory, tmp_path):
    assert runs.keepbest("plot", directory, "-o", tmp_path / "run.png").exit_code == 0
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert runs.keepbest("plot", directory, "-o", tmp_path / "run.svg").exit_code == 0
    texts = [element.text for element in ET.parse(tmp_path / "run.svg").iter() if element.tag.endswith("text")]
    named = {str(directory), BEST, "loss", "new best; the best is 3 at U6", "restart", "update"}
    assert named <= set(texts)
    assert "tolerance=1 keeps 4, closed at U4" in texts
    assert "tolerance=7 keeps 3, not exceeded" in texts
    refused = runs.keepbest("plot", directory, "-o", tmp_path / "run.jpg")
    assert (refused.exit_code, "ends in .png or .svg" in refused.stderr) == (1, True)


def test_report_is_one_file_with_the_picture_and_every_ref(directory, tmp_path):
    assert runs.keepbest("report", directory, "-o", tmp_path / "run.html").exit_code == 0
    text = (tmp_path / "run.html").read_text()
    assert text.count("<svg") == 1
    assert "&lt;run&gt;" in text
    assert "<run>" not in text
    assert not re.search(r"(src|href)=\"(?!#)", text), "it must not load anything"
    for ref in refs(directory):
        assert f"<code>{ref}</code>" in text
    assert f"<code>{BEST}.tolerance=7</code></td><td class=number>3</td><td>U6</td><td>not exceeded</td>" in text


def test_run_without_observations_says_so(tmp_path):
    with Run(tmp_path).keeper:
        pass
    for command in (["plot", tmp_path, "-o", tmp_path / "run.png"], ["tolerance", tmp_path]):
        ended = runs.keepbest(*command)
        assert (ended.exit_code, ended.stderr) == (1, "error: nothing was observed in this run yet\n")

"""To see a run: what any patience would have kept, the picture, and the report."""

from __future__ import annotations

import json
import math
import os
import re
import socket
from xml.etree import ElementTree as ET

import pytest

from keepbest import open_run
from keepbest.cli.numbers import parse_numbers
from keepbest.errors import ConfigError
from tests.kit import cli_runs as runs
from tests.kit.runs import Run, ledger, refs, update

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


@pytest.mark.parametrize("text", ["", "a", "3..", "5..2", "1,,2", "-1", "0..1000", "9" * 5000, "0.." + "9" * 5000])
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
    drawn = runs.keepbest("plot", directory, "-o", tmp_path / "run.png")
    size = (tmp_path / "run.png").stat().st_size
    assert (drawn.exit_code, drawn.stdout) == (0, f"{tmp_path / 'run.png'}: {size:,} bytes\n")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert runs.keepbest("plot", directory, "-o", tmp_path / "run.svg").exit_code == 0
    texts = [element.text for element in ET.parse(tmp_path / "run.svg").iter() if element.tag.endswith("text")]
    named = {BEST, "loss", "new best; the best is 3 at U6", "restart", "update"}
    assert named <= set(texts)
    title = next(text for text in texts if text and text.startswith("/"))
    begin, _, end = title.partition("\N{HORIZONTAL ELLIPSIS}")  # where a long path does not fit
    assert (str(directory).startswith(begin), str(directory).endswith(end)) == (True, True)
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


def test_history_as_json_is_the_ledger_with_what_was_abandoned(directory):
    rows = json.loads(runs.keepbest("show", directory, "--json", "--history").stdout)
    seen = [row for row in rows if row["event"] == "observation"]
    lines = [line for line in ledger(directory) if line["event"] == "observation"]
    assert [(row["iteration"], row["value"]) for row in seen] == [(line["iteration"], line["value"]) for line in lines]
    assert "nan" in [row["value"] for row in seen]
    assert [row["value"] for row in seen if row["is_abandoned"]] == [3.5, 7.0]
    assert {row["restart"] for row in seen if row["is_abandoned"]} == {0}
    assert [(row["event"], row["iteration"]) for row in rows[5:8]] == [
        ("end", None),
        ("restart", None),
        ("resume", "U3"),
    ]
    table = runs.keepbest("show", directory, "--history").stdout
    assert table.count("new best, saved as") == sum(row["is_new_best"] for row in seen)
    assert "restart 1" in table


def test_show_says_the_direction_and_how_far_training_is(directory):
    text = runs.keepbest("show", directory).stdout
    expected = (
        "loss: lower is better; best 3; intervals without a new best: 3; observations: 9, the last 3.1 at U9; ended"
    )
    assert expected in text
    with Run(directory.parent / "live", metric_key="accuracy").keeper as keeper:
        keeper.observe(0.5, update=1)
        unfinished = directory.parent / "live" / "checkpoints" / "snapshots" / ".tmp-U2"
        unfinished.mkdir()
        (unfinished / "model.pt").write_bytes(bytes(12345))
        text = runs.keepbest("show", directory.parent / "live").stdout
    assert "accuracy: higher is better; best 0.5; intervals without a new best: 0; " in text
    assert f"in use by process {os.getpid()} on {socket.gethostname()}\nbeing written: U2, 12,345 bytes so far" in text


def heights(panel):
    """The numbers beside the vertical axis of a panel, without their signs."""
    _, vertical = [each for each in panel.iter() if each.get("id", "").startswith("matplotlib.axis_")]
    texts = [each.text for each in vertical.iter() if each.tag.endswith("text")]
    return [float(each.strip("\N{MINUS SIGN}")) for each in texts if each not in ("loss", "accuracy")]


def panels(path):
    """The panels of a picture, from above."""
    return [each for each in ET.parse(path).iter() if re.fullmatch(r"axes_\d+", each.get("id", ""))]


@pytest.mark.parametrize(("metric", "sign"), [("loss", 1), ("accuracy", -1)])
def test_close_up_shows_where_bests_are_decided(metric, sign, tmp_path):
    run = Run(tmp_path / "run", metric_key=metric, keep_top_k=2)
    values = [sign * (10 * 0.5**number + 0.01 * (number % 3)) for number in range(40)]
    with run.keeper:
        run.observe(*values)
    assert runs.keepbest("plot", tmp_path / "run", "-o", tmp_path / "run.svg").exit_code == 0
    whole, close = panels(tmp_path / "run.svg")
    assert max(heights(close)) < 0.2
    assert min(abs(value) for value in values) >= min(heights(close))
    assert max(heights(whole)) >= 5
    texts = [element.text for element in ET.parse(tmp_path / "run.svg").iter() if element.tag.endswith("text")]
    low, high = sorted(values, key=abs)[:2]
    assert f"top 2: {low:.4g} to {high:.4g}" in texts


def test_runs_that_count_batches_alone_are_drawn(tmp_path):
    with Run(tmp_path / "run").keeper as keeper:
        keeper.observe(1.0, batch=7)
    [curve] = open_run(tmp_path / "run").curves()
    assert (curve.unit, [curve.position(point.iteration) for point in curve.points]) == ("batch", [7])


def test_picture_of_few_values_has_one_panel(directory, tmp_path):
    assert runs.keepbest("plot", directory, "-o", tmp_path / "run.svg").exit_code == 0
    assert len(panels(tmp_path / "run.svg")) == 1


def test_tolerances_that_keep_one_value_do_not_cover_each_other(tmp_path):
    run = Run(tmp_path / "run", tolerances=[1, 2, 3])
    with run.keeper:
        run.observe(3.0, 1.0, 2.0, 2.5, 2.0, 2.25, 2.0)
    assert runs.keepbest("plot", tmp_path / "run", "-o", tmp_path / "run.svg").exit_code == 0
    text = (tmp_path / "run.svg").read_text()
    squares = re.findall(r'd="M -([\d.]+) \1 \nL \1 \1 \nL \1 -\1 \nL -\1 -\1', text)
    assert len({*squares}) >= 3, "each is drawn around the one before"
    waits = re.findall(r'd="M [\d.]+ ([\d.]+) \nL [\d.]+ \1 \n"[^>]*stroke-dasharray: 1', text)
    assert len({*waits}) == 3, "each is at a height of its own"


def test_many_tolerances_have_room_in_the_picture(tmp_path):
    # The wait after each best is longer by one, so each tolerance from 0 to 29 keeps another one; then all that follow.
    values = [10.0 * (40 - gap) + later for gap in range(1, 32) for later in range(gap + 1)]
    run = Run(tmp_path / "run", tolerances=range(60))
    with run.keeper:
        run.observe(*values)
    assert runs.keepbest("plot", tmp_path / "run", "-o", tmp_path / "run.svg").exit_code == 0
    picture = ET.parse(tmp_path / "run.svg").getroot()
    texts = [element.text for element in picture.iter() if element.tag.endswith("text")]
    assert "tolerance=0 keeps 390, closed at U2" in texts
    assert "tolerance=29 keeps 100, closed at U495" in texts
    assert "tolerance=31 to 59 keep 90, not exceeded" in texts
    [axes] = panels(tmp_path / "run.svg")
    frame = next(element for element in axes.iter() if element.get("id", "").startswith("patch_"))
    corners = [float(number) for number in re.findall(r"[ML] [\d.]+ ([\d.]+)", ET.tostring(frame, "unicode"))]
    assert max(corners) - min(corners) > 150, "the legend leaves room for the curve"


@pytest.mark.parametrize("values", [(-1.7e308, 1.0), (1e308, -1e308, float("nan"), 2.0), (1.7e308,)])
def test_values_at_the_end_of_the_floats_are_drawn(values, tmp_path):
    run = Run(tmp_path / "run", tolerances=[0], keep_top_k=3)
    with run.keeper:
        run.observe(*values)
    ended = runs.keepbest("plot", tmp_path / "run", "-o", tmp_path / "run.svg")
    assert (ended.exit_code, ended.exception) == (0, None)
    texts = [element.text for element in ET.parse(tmp_path / "run.svg").iter() if element.tag.endswith("text")]
    assert "NaN or infinite, or too large" in texts


def test_report_takes_the_place_of_nothing_of_a_run(directory, tmp_path):
    ledger, weights = directory / "checkpoints" / "ledger.jsonl", tmp_path / "best.pt"
    weights.write_bytes(b"weights")
    before = ledger.read_bytes()
    for to, problem in {
        ledger: "a report ends in .html or .htm",
        weights: "a report ends in .html or .htm",
        ledger.with_name("a.html"): "is among the checkpoints",
    }.items():
        ended = runs.keepbest("report", directory, "-o", to)
        assert (ended.exit_code, problem in ended.stderr) == (1, True)
    assert (ledger.read_bytes(), weights.read_bytes()) == (before, b"weights")


def test_run_without_observations_says_so(tmp_path):
    with Run(tmp_path).keeper:
        pass
    for command in (["plot", tmp_path, "-o", tmp_path / "run.png"], ["tolerance", tmp_path]):
        ended = runs.keepbest(*command)
        assert (ended.exit_code, ended.stderr) == (1, "error: nothing was observed in this run yet\n")

"""The report of a run as a browser shows it, whatever the names in it are."""

from __future__ import annotations

import html
import math
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.kit import cli_runs as runs
from tests.kit.debian import install
from tests.kit.runs import Run, refs

ATTACK = '<script>document.title="stolen"</script><img src=x onerror=document.title="stolen">'
METRIC = f'loss & {ATTACK}/größe "x" $\\frac{{$'
VALUES = [5.0, 4.0, 4.5, 6.0, math.nan, 3.0, 3.5, math.inf, 3.1]
ABANDONED = [3.5, 7.0]  # after the third value


class Page(HTMLParser):
    """The elements of a page, and the texts in each kind of element."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img"):
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data):
        if self._open:
            self.texts[self._open[-1]][-1] += data

    def lines(self) -> list[int]:
        """How many points each line of the picture has."""
        paths = [attributes for tag, attributes in self.elements if tag == "path" and "clip-path" in attributes]
        return [len(re.findall("[ML]", path["d"])) for path in paths if "fill: none" in path["style"]]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """What is in a page once Chromium has opened the file."""
    install({"chromium": "chromium"})

    def open_page(path: Path, *more: str) -> str:
        profile = tmp_path_factory.mktemp("profile")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        command = ["chromium", *options, f"--user-data-dir={profile}", *more, "--dump-dom", path.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    return open_page


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A run that was resumed after its third value."""
    directory = tmp_path_factory.mktemp("seen") / "<b>run"
    settings = {"metric_key": METRIC, "higher_is_better": False, "tolerances": [1, 7], "keep_top_k": 2}
    first = Run(directory, **settings)
    with first.keeper:
        first.observe(*VALUES[:3])
        first.keeper.flush(pin="third")
        state = first.keeper.state_dict()
        first.observe(*ABANDONED, first=4)
    again = Run(directory, **settings)
    again.keeper.load_state_dict(state)
    with again.keeper:
        again.observe(*VALUES[3:], first=4)
    return directory


@pytest.fixture(scope="module")
def report(directory):
    path = directory.parent / "report.html"
    assert runs.keepbest("report", directory, "-o", path).exit_code == 0
    return path


@pytest.fixture(scope="module")
def page(browser, report):
    return Page(browser(report))


def test_curve_and_marks_are_drawn(page):
    finite = [value for value in VALUES if math.isfinite(value)]
    # The observed values, those that were abandoned, the restart, and how long each tolerance waited.
    assert sorted(page.lines()) == sorted([len(finite), len(ABANDONED), 2, 2, 2])
    texts = page.texts["text"]
    for label in ("observed", "new best; the best is 3 at U6", "abandoned", "restart", "NaN or infinite", "update"):
        assert texts.count(label) == 1
    assert "tolerance=1 keeps 4, closed at U4" in texts
    assert "tolerance=7 keeps 3, not exceeded" in texts


def test_table_has_every_ref_with_its_value(page, directory):
    kept = runs.checkpoints(directory)
    assert kept.keys() == refs(directory).keys()
    assert sorted(page.texts["code"][1:]) == sorted(kept)
    rows = [page.texts["td"][start : start + 5] for start in range(0, len(page.texts["td"]), 5)]
    assert [(row[1], row[2]) for row in rows] == [(f"{each.value:.9g}", each.iteration) for each in kept.values()]


def test_names_are_shown_and_not_run(browser, page, report, directory):
    assert page.texts["title"] == [str(directory)]
    assert page.texts["h1"] == [f"Best checkpoints of {directory}"]
    assert any("größe" in text for text in page.texts["text"])
    # It is the names that are harmless, not the policy alone.
    without = report.with_name("without.html")
    without.write_text(re.sub("<meta http-equiv.*?>", "", report.read_text()))
    for shown in (page, Page(browser(without))):
        assert shown.texts["title"] == [str(directory)]
        assert not {"script", "img", "b", "iframe", "link"} & {tag for tag, _ in shown.elements}
        assert [name for _, attributes in shown.elements for name in attributes if name.startswith("on")] == []


def test_page_loads_nothing(page):
    addresses = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name.split(":")[-1] in ("href", "src", "srcset", "data", "action")
    ]
    assert addresses != []
    assert {address[0] for address in addresses} == {"#"}
    for style in (*page.texts["style"], *(attributes.get("style") or "" for _, attributes in page.elements)):
        assert not re.search(r"@import|url\((?!#)", style)


@pytest.mark.parametrize(("policy", "title"), [(True, "safe"), (False, "stolen")])
def test_policy_of_the_report_stops_scripts_in_the_browser(policy, title, browser, report, tmp_path):
    kept = re.search("<meta http-equiv.*?>", report.read_text())[0] if policy else ""
    path = tmp_path / "page.html"
    path.write_text(f"<!doctype html><html><head>{kept}<title>safe</title></head><body>{ATTACK}</body></html>")
    assert Page(browser(path)).texts["title"] == [title]


# In a frame, since a window of Chromium has at least 500 pixels.
MEASURE = """
const {document: shown, innerWidth: width, getComputedStyle: style} = frames[0];
const texts = [...shown.querySelectorAll("h1, td")].map(each => style(each).color);
const inside = [...shown.querySelectorAll("svg text")].map(each => style(each).fill);
const page = [shown.documentElement.scrollWidth, style(shown.body).backgroundColor];
document.title = [width, ...page, ...new Set([...texts, ...inside])].join(";");
"""


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize(("scheme", "is_dark"), [(0, True), (1, False)])
def test_report_fits_narrow_windows_and_both_schemes(width, scheme, is_dark, browser, report, tmp_path):
    path, source = tmp_path / "frame.html", html.escape(report.read_text())
    path.write_text(
        f"<iframe width={width} height=900 style='border: 0' srcdoc='{source}' onload='{MEASURE}'></iframe>"
    )
    shown = Page(browser(path, f"--window-size={width + 100},900", f"--blink-settings=preferredColorScheme={scheme}"))
    inside, needed, *colors = shown.texts["title"][0].split(";")
    assert int(needed) <= int(inside) == width, "the page itself is not moved sideways"
    background, *texts = [sum(map(int, re.findall(r"\d+", color))) for color in colors]
    assert (background < 3 * 64) == is_dark
    assert texts
    assert all(abs(text - background) > 3 * 128 for text in texts), colors

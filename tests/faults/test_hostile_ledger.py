"""Ledgers that somebody damaged, forged, lost or put back: refused with the reason, never half believed."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest

from keepbest import load
from keepbest.errors import KeepBestError, LedgerError
from keepbest.run.events import VERSION
from keepbest.run.maintenance import repair
from keepbest.run.verify import verify
from tests.faults.hostile_run import (
    BEST,
    NEWEST,
    bits,
    flipped,
    holds,
    ledger,
    lines,
    make_run,
    net,
    refused_load,
    refused_start,
    rewrite,
)

HUGE = "9" * 5000


@pytest.fixture
def run(tmp_path) -> Path:
    make_run(tmp_path / "run")
    return tmp_path / "run"


def test_flipped_byte_of_the_ledger_loads_whole_weights_only(run, request):
    data = ledger(run).read_bytes()
    loaded, reasons = [], []
    flips = range(0, len(data), 23 if request.config.getoption("--quick") else 1)
    for at in flips:
        ledger(run).write_bytes(flipped(data, at))
        model = net(-1.0)
        try:
            load(run, BEST, model)
            loaded.append(bits(model))
        except KeepBestError as error:
            reasons.append(str(error))
            assert bits(model) == bits(net(-1.0))
        try:
            verify(run)
        except KeepBestError as error:
            reasons.append(str(error))
    assert set(map(str, loaded)) <= {str(bits(net(fill))) for fill in (2.0, 4.0)}
    assert all(reasons)
    assert len(reasons) > len(flips) // 2


def test_ledger_cut_at_any_byte_tells_the_lines_before(run, request):
    data = ledger(run).read_bytes()
    for size in range(0, len(data), 61 if request.config.getoption("--quick") else 7):
        ledger(run).write_bytes(data[:size])
        known = [json.loads(line) for line in data[:size].splitlines(keepends=True) if line.endswith(b"\n")]
        moved = [line["refs"][BEST] for line in known if BEST in line.get("refs", {})]
        if moved and moved[-1] in ("E2", NEWEST):
            assert holds(run) == {float(moved[-1][1:])}
        else:
            assert "SnapshotError" in refused_load(run)  # it names nothing, or what was removed since
        if NEWEST not in moved:
            assert "older copy" in refused_start(run)  # a resume does not sweep the weights that it does not know


def with_line(index: int, **changes):
    def forged(entries: list[dict]) -> list[dict]:
        entries[index] = {**entries[index], **changes}
        return entries

    return forged


OUTSIDE = ("../../x", "/etc", "..", ".", "", "a/b", "E4\0", ".hidden", "E4\n")
NO_NAMES = (5, None, ["E4"], {"E4": 1}, 1.5)
BEST_LINE, PIN, BEGIN = -2, {"event": "pin", "keeper": BEST, "tag": "x"}, 1
CHECKPOINT = {"event": "checkpoint", "iteration": "E4", "snapshot": "C4", "manifest": "00", "needs": [], "refs": {}}
FORGED_CHECKPOINTS = (
    *({"snapshot": name} for name in (*OUTSIDE, *NO_NAMES)),
    *({"needs": [name]} for name in (*OUTSIDE, *NO_NAMES, "E99")),
    *({"refs": {"resume.latest": name}} for name in (*OUTSIDE, "E99")),
    {"refs": {"resume": "C4"}}, {"refs": {"resume./x": "C4"}}, {"iteration": "../E4"}, {"manifest": 5}, {"needs": None},
    {"snapshot": "E4"}, {"event": "rewind", "abandoned": ["E4"]}, {"event": "rewind", "abandoned": None},
)  # fmt: skip
FORGED_LINES = {
    **{
        f"checkpoint with {forged!r}": lambda entries, forged=forged: [*entries, {**CHECKPOINT, **forged}]
        for forged in FORGED_CHECKPOINTS
    },
    **{f"snapshot {name!r}": with_line(BEST_LINE, snapshot=name) for name in (*OUTSIDE, 5, ["E4"], {"E4": 1})},
    **{f"ref to {name!r}": with_line(BEST_LINE, refs={BEST: name}) for name in (*OUTSIDE, 5, ["E4"], {"E4": 1})},
    **{f"ref named {name!r}": with_line(BEST_LINE, refs={name: "E4"}) for name in OUTSIDE},
    **{f"pin of {name!r}": lambda entries, name=name: [*entries, {**PIN, "snapshots": [name]}] for name in OUTSIDE},
    **{f"pins {name!r}": lambda entries, name=name: [*entries, {**PIN, "snapshots": name}] for name in (5, None, [[]])},
    "refs are a list": with_line(BEST_LINE, refs=["x"]),
    "refs are a text": with_line(BEST_LINE, refs="x"),
    "a keeper unknown": with_line(BEST_LINE, keeper="best_model.other"),
    "a keeper that is a list": with_line(BEST_LINE, keeper=["x"]),
    "no value": with_line(BEST_LINE, value=None),
    "a value in words": with_line(BEST_LINE, value="low"),
    "a huge whole value": with_line(BEST_LINE, value=10**400),
    "a huge iteration": with_line(BEST_LINE, iteration=f"E{HUGE}"),
    "no iteration": with_line(BEST_LINE, iteration=None),
    "an iteration outside": with_line(BEST_LINE, iteration="../E4"),
    "an iteration from before": with_line(BEST_LINE, iteration="E1"),
    "an iteration of other parts": with_line(BEST_LINE, iteration="E4_U9"),
    "a line twice": lambda entries: [*entries[:BEST_LINE], entries[BEST_LINE], *entries[BEST_LINE:]],
    "an unknown event": with_line(BEST_LINE, event="gift"),
    "a policy in words": with_line(BEGIN, policy="lowest"),
    "a policy of a bad tolerance": with_line(
        BEGIN, policy={"higher_is_better": False, "min_delta": 0.0, "tolerances": ["../x"]}
    ),
    "a state in words": with_line(BEGIN, state="fine"),
    "a restart in words": lambda entries: [*entries, {"event": "session", "restart": "1/../../../x"}],
    "a restart of nothing": lambda entries: [*entries, {"event": "session"}],
    "a newer format": with_line(0, version=VERSION + 1),
    "a format in words": with_line(0, version="4"),
    "no first line": lambda entries: entries[1:],
}


@pytest.mark.parametrize("kind", FORGED_LINES)
def test_forged_ledger_line_is_refused_everywhere(run, kind):
    rewrite(run, FORGED_LINES[kind](lines(run)))
    assert "LedgerError" in refused_load(run)
    assert "LedgerError" in refused_start(run)
    with pytest.raises(LedgerError):
        verify(run)
    with pytest.raises(LedgerError):
        repair(run)


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff\xfe{}\n", b'{"event":"observation\xc3\x28"}\n', b"[]\n", b"7\n", b"{}\n", b'{"event":1}\n', b"\n",
        b"[" * 100_000 + b"\n", b'{"event":"observation","value":' + HUGE.encode() + b"}\n",
    ],
    ids=range(9),
)  # fmt: skip
@pytest.mark.parametrize("has_checksum", [False, True])
def test_bytes_that_are_no_line_are_refused_everywhere(run, raw, has_checksum):
    kept = ledger(run).read_bytes().splitlines(keepends=True)
    if has_checksum:  # as whoever forges a line gives it
        body = raw.removesuffix(b"\n").removesuffix(b"}")
        raw = b'%b,"crc":"%08x"}\n' % (body, zlib.crc32(body))
    ledger(run).write_bytes(b"".join([*kept[:2], raw, *kept[2:]]))
    reason = refused_load(run)
    assert "LedgerError" in reason
    assert ("checksum" in reason) is not has_checksum
    assert "line 3" in refused_start(run)
    with pytest.raises(LedgerError):
        verify(run)


def test_newer_format_says_what_to_do(run):
    rewrite(run, with_line(0, version=VERSION + 1)(lines(run)))
    assert "another version of keepbest" in refused_load(run)


def test_lost_ledger_beside_snapshots_is_no_empty_folder(run):
    ledger(run).unlink()
    for resume in (None, "ledger"):
        assert "was lost, or is an older copy" in refused_start(run, resume)
    assert "missing or empty" in refused_load(run)


def test_older_copy_of_the_ledger_is_not_resumed(run):
    rewrite(run, lines(run)[:4])
    assert "was lost, or is an older copy" in refused_start(run)
    with pytest.raises(LedgerError, match="older copy"):
        repair(run)


def test_verify_calls_nothing_an_older_ledger_misses_left_over(run):
    rewrite(run, lines(run)[:4])
    [lost, *others] = verify(run)
    assert lost.kind == "damage"
    assert f"does not know the snapshots {NEWEST}: it was lost, or is an older copy. Restore it" in lost.message
    assert [fault for fault in others if fault.kind == "unfinished"] == [], "repair would change nothing"


def test_ledger_that_holds_two_is_refused(run):
    data = ledger(run).read_bytes()
    ledger(run).write_bytes(data * 2)
    expected = f"line {len(data.splitlines()) + 1}: another run begins here"
    assert expected in refused_load(run)
    assert expected in refused_start(run)


def test_line_that_does_not_follow_is_named_with_its_file(run):
    first, *others = lines(run)
    rewrite(run, [first, *reversed(others)])
    assert f"{ledger(run)}, line 2 makes no sense" in refused_load(run)
    assert f"{ledger(run)}, line 2 makes no sense" in refused_start(run)


def test_ends_of_lines_that_were_changed_are_said(run):
    data = ledger(run).read_bytes()
    ledger(run).write_bytes(data.replace(b"\n", b"\r\n"))
    assert "its lines end as on Windows" in refused_load(run)
    ledger(run).write_bytes(data.replace(b"\n", b" \n"))
    assert "Windows" not in refused_load(run)

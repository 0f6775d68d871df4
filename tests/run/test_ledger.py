from __future__ import annotations

import json

import pytest

from keepbest import load
from keepbest.errors import LedgerError
from tests.kit.runs import Run, ledger, refs, snapshots, update

BEST = "best_model.loss"


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path, tolerances=[0])
    with run.keeper:
        run.observe(3.0, 2.0, 2.5)
    return run


def path_of(run):
    return run.keeper.directory / "checkpoints" / "ledger.jsonl"


@pytest.mark.parametrize("torn", [b'{"event":"observ', b"\xff\xfe", b"{}"])
def test_torn_last_line_is_dropped(run, torn):
    whole = path_of(run).read_bytes()
    path_of(run).write_bytes(whole + torn)
    load(run.keeper.directory, BEST, run.model)
    again = Run(run.keeper.directory, tolerances=[0], resume="ledger")
    with again.keeper:
        assert again.keeper.state == run.keeper.state
    assert path_of(run).read_bytes().startswith(whole)
    assert torn not in path_of(run).read_bytes()[len(whole) :] or torn == b"{}"
    assert ledger(run.keeper.directory)[-1]["event"] == "end"


@pytest.mark.parametrize(
    "damage", [b"\xff", b"[1]", b'{"event": 7}', b'{"event": "nonsense"}', b'{"event": "observation"}', b""]
)
def test_damaged_line_is_named_on_reading_and_resuming(run, damage):
    lines = path_of(run).read_bytes().splitlines()
    lines[3] = damage
    damaged = b"\n".join([*lines, b""])
    path_of(run).write_bytes(damaged)
    with pytest.raises(LedgerError, match="line 4"):
        load(run.keeper.directory, BEST, run.model)
    with pytest.raises(LedgerError, match="line 4"):
        Run(run.keeper.directory, resume="ledger").keeper.start()
    assert path_of(run).read_bytes() == damaged
    assert snapshots(run.keeper.directory) == {"U2"}


def test_another_version_is_refused(run):
    lines = path_of(run).read_text().splitlines()
    lines[0] = json.dumps({**json.loads(lines[0]), "version": 2})
    path_of(run).write_text("\n".join([*lines, ""]))
    with pytest.raises(LedgerError, match=r'expected a ledger of version 6, found .*"version": 2'):
        Run(run.keeper.directory, resume="ledger").keeper.start()


def test_refs_and_snapshots_follow_the_ledger_after_a_crash(run):
    folder = run.keeper.directory / "checkpoints"
    wanted = refs(run.keeper.directory)
    (folder / BEST).unlink()
    (folder / f"{BEST}.tolerance=0").unlink()
    (folder / f"{BEST}.tolerance=0").symlink_to("snapshots/gone")
    (folder / "best_model.stray").symlink_to("snapshots/U2")
    (folder / "snapshots" / ".tmp-U9").mkdir()
    (folder / "snapshots" / "U9").mkdir()
    with Run(run.keeper.directory, tolerances=[0], resume="ledger").keeper:
        assert refs(run.keeper.directory) == wanted
        assert snapshots(run.keeper.directory) == {"U2"}
    assert [path.name for path in (folder / "snapshots").iterdir()] == ["U2"]


def test_quiet_intervals_are_on_disk_after_a_flush_bit_for_bit(tmp_path):
    values = [0.1 + 0.2, 1e308, 5e-324, float("inf"), float("nan"), -0.0, 1.0]
    run = Run(tmp_path)
    run.observe(*values)
    run.keeper.flush()
    seen = [line["value"] for line in ledger(tmp_path) if line["event"] == "observation"]
    assert repr([float(value) for value in seen]) == repr(values)
    text = path_of(run).read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    run.keeper.abandon()
    with Run(tmp_path, resume="ledger").keeper as keeper:
        assert keeper.state.last_iteration == update(len(values))

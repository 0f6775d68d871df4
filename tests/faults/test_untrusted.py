"""Run folders from somebody else: nothing in them runs, leads out or grows, and what is printed of them is text."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn

from keepbest import BestKeeper, load
from keepbest.callbacks.resume import find_to_resume
from keepbest.cli.work import evaluate, train
from keepbest.errors import KeepBestError
from keepbest.ranks import Ranks
from keepbest.run.verify import verify
from tests.faults.hostile_run import (
    BEST,
    Evil,
    checkpoints,
    forge_manifest,
    ledger,
    lines,
    make_run,
    net,
    record,
    refused_load,
    rewrite,
    settings,
    snapshot,
    tree,
)
from tests.kit import cli_runs as runs

# Every command that reads a run, or repairs it.
COMMANDS = {
    "show": ["show"],
    "json": ["show", "--json"],
    "history": ["show", "--history"],
    "history as JSON": ["show", "--history", "--json"],
    "tolerance": ["tolerance"],
    "plot": ["plot", "-o", "{out}.svg"],
    "report": ["report", "-o", "{out}.html"],
    "verify": ["verify"],
    "export": ["export", "{ref}", "--to", "{out}.pt"],
    "average": ["average", "top=1..2", "--to", "{out}.average.pt"],
    "export to a folder": ["export", "{ref}", "--to", "{out}"],
    "repair": ["repair"],
}


def outputs(run: Path, out: Path, ref: str = BEST) -> dict[str, str]:
    """What each command prints. None ends in anything but success or an error of ours."""
    found = {}
    for name, (verb, *arguments) in COMMANDS.items():
        filled = [each.format(out=out, ref=ref) for each in arguments]
        ended = runs.keepbest(verb, run, *filled)
        assert ended.exception is None or isinstance(ended.exception, SystemExit), (name, ended.exception)
        found[name] = ended.output
    return found


# --- nothing runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of the trainer with resume checkpoints, whose weights are distributed checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    content = runs.describe_run(folder / "run", updates=2)
    content["optimizer"]["kind"] = "torch.optim.Adam"
    del content["optimizer"]["momentum"]
    saves = {"name": "CheckpointCallback", "every_n_updates": 1}
    content["trainer"]["callbacks"] = [runs.evaluation(), runs.best(tolerances=[0], keep_top_k=2, format="dcp"), saves]
    train(runs.write_config(folder / "config.yaml", content), [])
    return folder / "run"


def bare(evil: Evil) -> bytes:
    return pickle.dumps(evil)


def archive(evil: Evil) -> bytes:
    torch.save({"state": evil}, data := io.BytesIO())
    return data.getvalue()


FILES = (
    "config.yaml", "metrics.jsonl", "checkpoints/ledger.jsonl", "checkpoints/lock", "checkpoints/snapshots/*/.metadata",
    "checkpoints/snapshots/*/snapshot.json", "checkpoints/snapshots/*/encoder.dcp/.metadata",
    "checkpoints/snapshots/*/encoder.dcp/__0_0.distcp",
    "checkpoints/snapshots/*/model.dcp/.metadata", "checkpoints/snapshots/*/model.dcp/__0_0.distcp",
    "checkpoints/snapshots/*/trainer.pt", "checkpoints/snapshots/*/random.pt",
)  # fmt: skip


def use_in_every_way(run: Path, config: Path, out: Path) -> None:
    outputs(run, out, runs.BEST)
    with suppress(KeepBestError):
        load(run, runs.BEST, nn.Linear(2, 2))
    with suppress(KeepBestError, OSError):
        train(config, [f"directory={run}", "trainer.resume=auto", "trainer.updates=3"])


def copy_of(trained: Path, to: Path) -> Path:
    shutil.copytree(trained, to, symlinks=True)
    return to


@pytest.mark.parametrize("payload", [bare, archive])
def test_payload_in_any_file_of_a_run_is_not_run(trained, tmp_path, payload, request):
    mark = tmp_path / "it ran"
    config = trained.parent / "config.yaml"
    seen = set()
    files = FILES[:: 16 if request.config.getoption("--quick") else 1]
    for number, pattern in enumerate(files):
        run = copy_of(trained, tmp_path / str(number))
        for path in run.glob(pattern):
            path.write_bytes(payload(Evil(mark)))
            seen.add(pattern)
        record(run)
        use_in_every_way(run, config, tmp_path / f"out-{number}")
        assert not mark.exists(), pattern
    assert seen >= set(files) - {"checkpoints/snapshots/*/.metadata"}
    pickle.loads(bare(Evil(mark)))
    assert mark.exists()  # it would have done it


def test_eval_says_whose_classes_it_runs_and_takes_others(trained, tmp_path, capsys):
    run = copy_of(trained, tmp_path / "run")
    evaluate(run, runs.BEST, [])
    assert f"runs the classes that {run / 'config.yaml'} names, which came with the run" in capsys.readouterr().out
    (run / "config.yaml").write_text("model: {kind: os.system}")
    evaluate(run, runs.BEST, [], config=trained.parent / "config.yaml")
    said = capsys.readouterr().out
    assert f"runs the classes that {trained.parent / 'config.yaml'} names, which you chose" in said
    assert runs.METRIC in said


# --- nothing leads out ------------------------------------------------------------------------------------------------

LINKED = (
    "checkpoints", "checkpoints/snapshots", "checkpoints/lock", "checkpoints/ledger.jsonl", "checkpoints/snapshots/*",
    "checkpoints/snapshots/*/snapshot.json", "checkpoints/snapshots/*/encoder.dcp",
    "checkpoints/snapshots/*/encoder.dcp/.metadata", "checkpoints/snapshots/*/encoder.dcp/__0_0.distcp",
)  # fmt: skip
LINKED_BESIDE = ("metrics.jsonl", "config.yaml")

EXPLORED = {
    "pattern": [*LINKED, *LINKED_BESIDE],
    "place_of_text": ["metric_key", "run", "tag", "file", "part", "digest", "parts of the path"],
    "value": [1.7e308, -1.7e308, 5e-324],
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name in EXPLORED.keys() & set(metafunc.fixturenames):
        metafunc.parametrize(name, EXPLORED[name][:: 16 if metafunc.config.getoption("--quick") else 1])


def test_link_out_of_the_folder_is_not_followed(trained, tmp_path, pattern):
    run, elsewhere = copy_of(trained, tmp_path / "run"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    for number, path in enumerate(sorted(path for path in run.glob(pattern) if not path.is_symlink())):
        path.rename(elsewhere / str(number))
        path.symlink_to(elsewhere / str(number))
    before = {path: path.is_file() and path.read_bytes() for path in elsewhere.rglob("*")}
    assert before
    use_in_every_way(run, trained.parent / "config.yaml", tmp_path / "out")
    assert {path: path.is_file() and path.read_bytes() for path in elsewhere.rglob("*")} == before
    if pattern in LINKED:
        assert not (tmp_path / "out.pt").exists()
        with pytest.raises(KeepBestError, match=r"link|unreadable|cannot be read"):
            load(run, runs.BEST, nn.Linear(2, 2))


def test_link_named_latest_is_not_followed_but_the_ledger(trained, tmp_path):
    run = copy_of(trained, tmp_path / "run")
    link = run / "checkpoints/resume.latest"
    link.unlink()
    link.symlink_to(copy_of(trained, tmp_path / "other") / "checkpoints/resume.latest")
    assert find_to_resume(run, link, Ranks.connect()).directory == run
    with pytest.raises(KeepBestError, match="no complete resume checkpoint"):
        find_to_resume(run, run / "checkpoints/best_model.none", Ranks.connect())


@pytest.mark.parametrize(
    "name", ["checkpoints", "checkpoints/snapshots", "checkpoints/ledger.jsonl", "checkpoints/lock"]
)
@pytest.mark.parametrize("file_format", ["torch", "dcp"])
def test_new_run_writes_through_no_link(tmp_path, name, file_format):
    victim = tmp_path / "victim"
    victim.write_text("years") if "." in name or name.endswith("lock") else victim.mkdir()
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.symlink_to(victim)
    before = tree(tmp_path)
    with pytest.raises(KeepBestError, match="is a link to"):
        BestKeeper(net(0.0), directory=tmp_path / "run", **settings(format=file_format)).start()
    assert tree(tmp_path) == before


def test_folder_that_is_a_link_to_another_disk_names_the_way(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "scratch")
    with pytest.raises(KeepBestError, match=f"checkpoints is a link to .*, let {tmp_path / 'run'} itself be the link"):
        BestKeeper(net(0.0), directory=tmp_path / "run", **settings()).start()


def test_directory_of_a_run_may_be_reached_through_links(tmp_path):
    (tmp_path / "scratch/a").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "scratch")
    (tmp_path / "here").symlink_to(tmp_path / "runs/a")
    make_run(tmp_path / "here")
    assert verify(tmp_path / "here") == []
    assert load(tmp_path / "here", BEST, net(0.0)).value == 1.0


def test_pipe_in_the_place_of_a_file_is_no_file(tmp_path):
    make_run(tmp_path / "run")
    path = snapshot(tmp_path / "run") / "model.pt"
    path.unlink()
    os.mkfifo(path)
    assert "is no file" in refused_load(tmp_path / "run")
    ledger(tmp_path / "run").unlink()
    os.mkfifo(ledger(tmp_path / "run"))
    assert "is no file" in refused_load(tmp_path / "run")


# --- nothing but text -------------------------------------------------------------------------------------------------

MARKUP = "</text></svg><script>alert(1)</script><img src=x onerror=alert(2)>[bold]x[/a] :smile:"
NASTY = f"\x1b[31m\x9b2J\r\u202e\x07{MARKUP}\nout"


def is_plain(text: str) -> bool:
    return all(letter.isprintable() or letter == "\n" for letter in text) and "\nout" not in text


def test_text_of_a_folder_reaches_no_terminal_as_it_is(tmp_path, place_of_text, caplog):
    run = tmp_path / ("run[/a]" if place_of_text == "parts of the path" else "run")
    make_run(run)
    entries = lines(run)
    if place_of_text == "metric_key":
        entries[1]["metric_key"] = NASTY
    if place_of_text == "run":
        entries[0]["run"] = NASTY
    if place_of_text == "tag":
        entries.append({"event": "pin", "keeper": BEST, "tag": NASTY, "snapshots": ["E9"]})
    if place_of_text == "file":
        (checkpoints(run) / "snapshots" / NASTY.replace("/", "")).mkdir()
        (snapshot(run) / NASTY.replace("/", "")).write_text("x")
    rewrite(run, entries)
    if place_of_text in ("part", "digest"):
        manifest = json.loads((snapshot(run) / "snapshot.json").read_text())
        if place_of_text == "part":
            manifest["parts"][0][0] = manifest["files"]["model.pt"]["part"] = NASTY
        else:
            manifest["files"]["model.pt"]["algorithm"] = NASTY
        forge_manifest(run, manifest)
    found = outputs(run, tmp_path / "out")
    assert [name for name, text in found.items() if not is_plain(text)] == []
    assert is_plain(caplog.text)
    for picture in (tmp_path / "out.svg", tmp_path / "out.html"):
        if picture.exists():
            text = picture.read_text()
            assert is_plain(text)
            assert "<script" not in text
            assert "<img" not in text
    with pytest.raises(KeepBestError) as refused:
        load(run, NASTY, net(0.0))
    assert is_plain(str(refused.value))


def test_numbers_at_the_end_of_their_range_are_drawn(tmp_path, value):
    make_run(run := tmp_path / "run")
    entries = lines(run)
    [newest] = [entry for entry in entries if entry.get("iteration") == "E4"]
    newest.update(iteration=f"E{2**63 - 1}", value=value)
    rewrite(run, entries)
    outputs(run, tmp_path / "out")
    for picture in (tmp_path / "out.svg", tmp_path / "out.html"):
        numbers = re.findall(r'(?:points|[xy][12]?|c[xy])="([^"]*)"', picture.read_text())
        assert numbers
        assert not [each for each in numbers if "nan" in each or "inf" in each]

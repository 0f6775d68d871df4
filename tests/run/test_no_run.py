"""Places that are no run, in every command and function that takes one: one line that says what to give instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from keepbest import BestKeeper, load
from keepbest.errors import ConfigError, SnapshotError
from keepbest.export import export
from tests.kit import cli_runs as runs
from tests.kit.runs import Run, snapshots, update

COMMANDS = {
    "show": ["show", "RUN"],
    "history": ["show", "RUN", "--history"],
    "verify": ["verify", "RUN"],
    "plot": ["plot", "RUN", "-o", "x.png"],
    "report": ["report", "RUN", "-o", "x.html"],
    "tolerance": ["tolerance", "RUN"],
    "export": ["export", "RUN", "best_model.loss", "--to", "x.pt"],
    "repair": ["repair", "RUN"],
    "upload": ["upload", "RUN", "file:///nowhere"],
    "eval": ["eval", "RUN"],
    "eval-ref": ["eval", "RUN", "--ref", "best_model.loss"],
}
PLACES = {
    "nothing": ("nowhere", "there is nothing"),
    "a file": ("file", "it is a file"),
    "below a file": ("file/a", "there is nothing"),
    "empty": ("empty", "empty/checkpoints/ledger.jsonl is missing or empty"),
    "its checkpoints": ("runs/a/checkpoints", "give the run itself: RUNS/a"),
    "its snapshots": ("runs/a/checkpoints/snapshots", "give the run itself: RUNS/a"),
    "a snapshot": ("runs/a/checkpoints/snapshots/U1", "give the run itself: RUNS/a"),
    "a ref": ("runs/a/checkpoints/best_model.loss", "give the run itself: RUNS/a"),
    "its ledger": ("runs/a/checkpoints/ledger.jsonl", "give the run itself: RUNS/a"),
    "a folder of one run": ("runs/more", "it holds one; give that: RUNS/more/c"),
    "a folder of runs": ("runs", "it holds 2 runs: a, b; give one of them, such as RUNS/a"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("places")
    for name in ("a", "b", "more/c"):
        with (run := Run(root / "runs" / name)).keeper:
            run.observe(1.0)
    (root / "file").write_text("mine")
    (root / "empty").mkdir()
    return root


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_to_give_instead(command, places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place, (path, remedy) in PLACES.items():
        if command == "show" and place.startswith("a folder of"):
            continue  # which it ranks
        ended = runs.keepbest(*(str(places / path) if word == "RUN" else word for word in COMMANDS[command]))
        assert (ended.exit_code, type(ended.exception)) == (1, SystemExit), place
        [line] = ended.stderr.splitlines()
        assert f"{places / path} is not the directory of a run with checkpoints: " in line
        assert remedy.replace("RUNS", str(places / "runs")) in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", PLACES)
def test_load_and_export_say_what_to_give_instead(place, places, tmp_path):
    path, remedy = PLACES[place]
    for read in (
        lambda run: load(run, "best_model.loss", nn.Linear(1, 1)),
        lambda run: export(run, "best_model.loss", tmp_path / "x.pt"),
    ):
        with pytest.raises(SnapshotError) as caught:
            read(places / path)
        assert remedy.replace("RUNS", str(places / "runs")) in str(caught.value)


@pytest.mark.parametrize("inner", ["checkpoints", "checkpoints/snapshots/U1"])
def test_keeper_inside_of_a_run_is_refused(inner, tmp_path):
    with (run := Run(tmp_path)).keeper:
        run.observe(1.0)
    before = runs.tree(tmp_path)
    with pytest.raises(ConfigError, match=f"give the run itself, {tmp_path}, or another directory"):
        BestKeeper(nn.Linear(1, 1), directory=tmp_path / inner, metric_key="loss", resume="ledger").start()
    assert runs.tree(tmp_path) == before


def test_load_without_a_ref_takes_the_only_best(tmp_path):
    one = Run(tmp_path, tolerances=[0], keep_top_k=2)
    with one.keeper:
        one.observe(3.0, 4.0, 2.0, 5.0)
    model = nn.Linear(1, 1)
    for run in (tmp_path, f"file://{tmp_path}"):
        nn.init.zeros_(model.weight)
        assert (load(run, model=model).value, int(model.weight)) == (2.0, 3)
    with (Run(tmp_path, id="b", resume="ledger")).keeper as other:
        other.observe(1.0, update(1))
    with pytest.raises(ConfigError, match=r"has 2 best checkpoints; say which ref is meant: best_model.loss, "):
        load(tmp_path, model=model)


@pytest.mark.parametrize("arguments", [(nn.Linear(1, 1),), ("best_model.loss",), ()], ids=["model", "ref", "nothing"])
def test_load_with_arguments_in_the_wrong_place_says_which_are_expected(arguments, places):
    with pytest.raises(ConfigError, match=r"expected load\(run, ref, model\), or load\(run, model=model\)"):
        load(places / "runs" / "a", *arguments)


def test_export_to_pth_is_a_file_as_to_pt(places, tmp_path):
    paths = [*export(places / "runs" / "a", "best_model.loss", tmp_path / "x.pth")]
    assert paths == [tmp_path / "x.pth"]
    assert set(torch.load(paths[0], weights_only=True)) == {"weight", "bias"}
    assert snapshots(places / "runs" / "a") == {"U1"}


@pytest.mark.parametrize("name", ["x.bin", "x.ckpt", "x.pkl", "x.h5", "x.zip"])
def test_export_to_another_kind_of_file_is_refused(name, places, tmp_path):
    with pytest.raises(ConfigError, match=f"ends in .{name[2:]}, which is no kind of file that is written here"):
        export(places / "runs" / "a", "best_model.loss", tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_export_into_a_file_is_refused(places):
    with pytest.raises(ConfigError, match="exists; nothing is overwritten"):
        export(places / "runs" / "a", "best_model.loss", places / "file")
    assert (places / "file").read_text() == "mine"


@pytest.mark.parametrize("form", ["torch", "dcp"])
@pytest.mark.parametrize("place", ["file", "file/a/b"])
def test_run_in_the_place_of_a_file_is_refused(place, form, places):
    keeper = BestKeeper(nn.Linear(1, 1), directory=places / place, metric_key="loss", format=form)
    with pytest.raises(ConfigError, match=rf"at {places / place}; but {places / 'file'} is a file$"):
        keeper.start()
    assert (places / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "command", [["export", "best_model.loss", "--to", "x.pt"], ["plot", "-o", "x.png"], ["report", "-o", "x.html"]]
)
def test_output_below_a_file_is_refused(command, places):
    name, *options, to = command
    ended = runs.keepbest(name, places / "runs" / "a", *options, places / "file" / to)
    assert (ended.exit_code, ended.stderr.count("\n")) == (1, 1)
    assert f"{places / 'file'} is a file" in ended.stderr
    assert (places / "file").read_text() == "mine"


def test_variable_that_is_not_set_is_no_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (
        lambda: BestKeeper(nn.Linear(1, 1), directory="", metric_key="loss"),
        lambda: load("", model=nn.Linear(1, 1)),
    ):
        with pytest.raises(ConfigError, match="expected a path, got an empty text"):
            use()
    ended = runs.keepbest("show", "")
    assert (ended.exit_code, "expected a path, got an empty text" in ended.stderr) == (1, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["torch", "dcp"])
def test_link_to_nothing_is_no_place_for_a_run_or_a_file(form, places, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    there = f"but {tmp_path / 'link'} is a link to nothing"
    with pytest.raises(ConfigError, match=there):
        BestKeeper(nn.Linear(1, 1), directory=tmp_path / "link", metric_key="loss", format=form).start()
    with pytest.raises(ConfigError, match=there):
        export(places / "runs" / "a", "best_model.loss", tmp_path / "link" / "x.pt")
    assert not (tmp_path / "nothing").exists()

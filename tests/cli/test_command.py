"""The command as a user types it, who may be anywhere and may lack the extra."""

from __future__ import annotations

import errno
import os
import sys

import pytest
from typer.testing import CliRunner

from keepbest.__main__ import main
from keepbest.cli.app import app
from tests.kit import cli_runs as runs
from tests.kit.runs import Run, update
from tests.kit.toys import Waves


def test_config_names_classes_of_the_present_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model_that_is_here.py").write_text(
        "from tests.kit.toys import AutoEncoder\nclass Mine(AutoEncoder): ...\n"
    )
    content = runs.describe_run(tmp_path / "run", epochs=1)
    content["model"]["kind"] = "model_that_is_here.Mine"
    # An installed command has the folder that it lies in where `python -m` has the present folder.
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    known = list(sys.path)
    trained = runs.keepbest("train", runs.write_config(tmp_path / "config.yaml", content))
    assert trained.exit_code == 0, trained.output
    assert runs.BEST in runs.checkpoints(tmp_path / "run")
    assert sys.path == known


@pytest.mark.parametrize("is_read", [True, False])
def test_training_ends_well_where_its_table_cannot_be_read(is_read, tmp_path, monkeypatch, caplog):
    def refuse(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    config = runs.write_config(tmp_path / "config.yaml", runs.describe_run(tmp_path / "run", epochs=1))
    with monkeypatch.context() as patch:
        if not is_read:
            patch.setattr("keepbest.run.reader.read_ledger", refuse)
        trained = runs.keepbest("train", config)
    assert (trained.exit_code, "checkpoints of" in trained.output) == (0, is_read)
    assert ("Input/output error" in caplog.text) is not is_read
    assert (f"python -m keepbest show {tmp_path / 'run'}" in caplog.text) is not is_read
    assert runs.keepbest("verify", tmp_path / "run").exit_code == 0


def test_message_names_the_extra_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "keepbest.cli.app")
    with pytest.raises(SystemExit, match=r"'typer'; install it with: pip install 'keepbest\[cli\]'"):
        main()


@pytest.mark.parametrize(("no_color", "is_red"), [("", True), ("1", False)])
def test_errors_have_no_color_where_none_is_wanted(no_color, is_red, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_COLOR", no_color)
    ended = CliRunner(**runs.APART).invoke(app, ["show", str(tmp_path)], color=True)
    assert ended.exit_code == 1
    assert ended.stderr.startswith("\x1b[31merror: " if is_red else f"error: {tmp_path}")
    assert ("\x1b" in ended.stderr) == is_red


@pytest.mark.parametrize("command", [["show"], ["show", "--json"], ["verify"], ["launch-script"]], ids=" ".join)
def test_command_ends_quietly_where_its_output_is_closed(command, tmp_path, monkeypatch, capfd):
    with Run(tmp_path).keeper as keeper:
        keeper.observe(1.0, update(1))
    reader, writer = os.pipe()
    os.close(reader)  # as of `| head`
    with os.fdopen(writer, "w") as output, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as end:
            app([*command, *([] if command == ["launch-script"] else [str(tmp_path)])])
    assert (end.value.code, capfd.readouterr().err) == (1, "")


def test_closed_pipe_of_the_users_code_is_shown(tmp_path, monkeypatch):
    def send(*_: object) -> None:
        raise BrokenPipeError(32, "the server of the data is gone")

    monkeypatch.setattr(Waves, "__getitem__", send)
    config = runs.write_config(tmp_path / "config.yaml", runs.describe_run(tmp_path / "run", epochs=1))
    trained = runs.keepbest("train", config)
    assert trained.exit_code == 1
    assert "in send" in trained.stderr
    assert "the server of the data is gone" in trained.stderr


@pytest.mark.parametrize(("command", "name"), [("train", "KEY=VALUE"), ("launch-script", "NAME")])
def test_usage_brackets_once_what_may_be_left_out(command, name):
    [usage] = [line for line in runs.keepbest(command, "--help").stdout.splitlines() if "Usage:" in line]
    assert usage.split()[-1].removesuffix("...") in (name, f"[{name}]")  # typer 0.15 has no brackets there


@pytest.mark.parametrize("command", ["train", "eval --config", "export RUN best --to", "plot RUN -o", "report RUN -o"])
def test_empty_path_is_not_taken_for_the_present_folder(command, tmp_path, monkeypatch):
    with Run(tmp_path / "run").keeper as keeper:
        keeper.observe(1.0, update(1))
    monkeypatch.chdir(tmp_path)
    ref = keeper.name
    words = [{"RUN": "run", "best": ref}.get(word, word) for word in command.split()]
    ended = runs.keepbest(*words, "", *(["run"] if command.startswith("eval") else []))
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert "expected a path, got an empty text" in ended.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_training_that_keeps_nothing_is_warned_of(tmp_path, caplog):
    config = runs.write_config(tmp_path / "config.yaml", runs.describe_run(tmp_path / "run", epochs=1))
    assert runs.keepbest("train", config, "trainer.callbacks=[]").exit_code == 0
    assert "trainer.callbacks is empty, so nothing is evaluated and no weights are kept" in caplog.text
    caplog.clear()
    assert runs.keepbest("train", config, f"directory={tmp_path / 'kept'}").exit_code == 0
    assert "no weights are kept" not in caplog.text


@pytest.mark.parametrize("seconds", ["1e300", "inf", "nan", "0"])
def test_timeout_that_no_clock_counts_is_refused(seconds, tmp_path):
    ended = runs.keepbest("eval", tmp_path, "--timeout", seconds)
    assert ended.exit_code == 2
    assert "Invalid value for '--timeout'" in ended.stderr

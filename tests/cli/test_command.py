"""The command as a user types it, who may be anywhere and may lack the extra."""

from __future__ import annotations

import sys

import pytest

from keepbest.__main__ import main
from tests.kit import cli_runs as runs


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


def test_message_names_the_extra_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "keepbest.cli.app")
    with pytest.raises(SystemExit, match=r"'typer'; install it with: pip install 'keepbest\[cli\]'"):
        main()

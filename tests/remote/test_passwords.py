"""Passwords in the URL of a run: they are refused by every face, and nothing shows or holds them."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
from torch import nn
from typer.testing import CliRunner

from keepbest import BestKeeper, load, open_run
from keepbest.cli.app import app
from keepbest.errors import ConfigError, KeepBestError, RunExistsError
from keepbest.remote.storage import check_remote
from tests.kit.runs import Run

SECRET = "hunter2Xy"
URLS = [
    f"s3://user:{SECRET}@host/runs/a",
    f"s3://AKIA:wJa/{SECRET}/bPx@bucket/runs/a",
    f"https://user:p@ss{SECRET}@host:8080/runs/a",
    f"sftp://somebody@example.org:{SECRET}@host/runs/a",
    f"simplecache::sftp://:{SECRET}@host/runs/a",
    f"https://host/runs/a?token={SECRET}",
    f"https://host/runs/a?v=1&X-Amz-Signature={SECRET}",
]
FACES = {
    "remote": lambda url, here: Run(here, remote=url).keeper,
    "directory": lambda url, _: Run(Path(url)).keeper,
    "directory as text": lambda url, _: BestKeeper(nn.Linear(1, 1), directory=url, metric_key="loss"),
    "load": lambda url, _: load(url, "best_model.loss", nn.Linear(1, 1)),
    "open_run": lambda url, _: open_run(url),
}


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("url", URLS)
def test_url_with_a_password_is_refused_without_it(url, face, tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "keepbest")
    with pytest.raises(ConfigError) as raised:
        FACES[face](url, tmp_path / "a")
    assert SECRET not in f"{raised.value!r} {raised.value} {caplog.text}"
    assert "***" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["show", "verify", "upload"])
@pytest.mark.parametrize("url", URLS)
def test_command_refuses_a_password_without_it(url, command, tmp_path):
    arguments = [str(tmp_path), url] if command == "upload" else [url]
    result = CliRunner().invoke(app, [command, *arguments])
    assert result.exit_code != 0
    assert SECRET not in f"{result.output} {result.exception!r}"


@pytest.mark.parametrize(
    "url",
    [
        "memory://runs/a:b@c",
        "memory://host:8080/runs@v2",
        "memory://user@host/a",
        "memory://a/b?version=3",
        "memory://[fe80::1]:22/runs@v2",
    ],
)
def test_url_without_a_password_is_taken_as_it_is(url):
    assert check_remote(url) == url


def test_error_with_two_bases_hides_a_password_too():
    error = RunExistsError(f"sftp://user:{SECRET}@host/a holds a run")
    assert (str(error), error.args) == ("sftp://user:***@host/a holds a run", (str(error),))


@pytest.mark.parametrize("text", ["?key" * 5000, "?" * 9000 + "key" * 3000, ":/a:" * 5000])
def test_error_with_a_long_text_is_made_at_once(text):
    before = time.process_time()
    assert str(KeepBestError(f"s3://a {text}")) == f"s3://a {text}"
    assert time.process_time() - before < 2.0

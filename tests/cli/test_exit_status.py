"""Which rank says what, and how its process ends."""

from __future__ import annotations

import contextlib
import io

import pytest
import typer

from keepbest.cli.exit_status import run_command
from keepbest.errors import ConfigError, PreemptedError, RankLostError, RankTimeoutError
from tests.kit.launched import leave_for_torchrun
from tests.kit.pool import run_ranks
from tests.kit.ports import held_ports


def exit_status_and_text(kind, port):
    """As under torchrun: of a command that raises on both ranks."""
    rank = leave_for_torchrun(port)

    def fail():
        raise kind(f"seen by rank {rank}")

    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(typer.Exit) as ended:
        run_command(fail, timeout=30.0, debug=False)
    return ended.value.exit_code, said.getvalue()


@pytest.mark.parametrize(
    ("kind", "status", "texts"),
    [
        (ConfigError, 1, ["error: seen by rank 0\n", ""]),
        (PreemptedError, 75, ["seen by rank 0\n", ""]),
        (RankLostError, 1, ["error: seen by rank 0\n", "error: seen by rank 1\n"]),
        (RankTimeoutError, 1, ["error: seen by rank 0\n", "error: seen by rank 1\n"]),
    ],
)
def test_error_that_all_ranks_share_is_said_by_one(kind, status, texts, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    with held_ports(1) as [port]:
        ends = run_ranks(exit_status_and_text, 2, kind, port)
    assert ends == [(status, text) for text in texts]

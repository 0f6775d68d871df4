"""Which rank says what, and how its process ends."""

from __future__ import annotations

import contextlib
import io
import os

import pytest
import torch.distributed as dist
import typer

from keepbest.cli.exit_status import run_command
from keepbest.errors import ConfigError, PreemptedError, RankLostError, RankTimeoutError
from tests.kit.pool import run_ranks
from tests.kit.ports import held_ports


def exit_status_and_text(kind, port):
    """As under torchrun: of a command that raises on both ranks."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})

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

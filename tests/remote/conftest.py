from __future__ import annotations

import itertools
import time

import pytest

from tests.remote.server import BUCKET, CREDENTIALS, serving


@pytest.fixture(scope="session")
def served():
    with serving() as (server, link):
        yield server, link


class Place:
    """A place for a run in the bucket, empty."""

    def __init__(self, server, link, prefix):
        self.server = server
        self.link = link
        self.prefix = prefix
        self.url = f"s3://{BUCKET}/{prefix}"

    def objects(self) -> dict[str, bytes]:
        return self.server.objects(f"{self.prefix}/checkpoints")

    def wait_for_a_snapshot(self) -> None:
        """Until the ledger there names one."""
        deadline = time.monotonic() + 60
        while b'"snapshot"' not in self.objects().get("ledger.jsonl", b""):
            assert time.monotonic() < deadline
            time.sleep(0.01)  # a storage reports only when it is asked

    def snapshots(self) -> set[str]:
        return {path.split("/")[1] for path in self.objects() if path.startswith("snapshots/")}


_numbers = itertools.count()


@pytest.fixture
def place(served, monkeypatch):
    server, link = served
    link.repair()
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": link.url}.items():
        monkeypatch.setenv(name, value)
    # Clients are kept for as long as a process lives, and with them the address that the server had.
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    return Place(server, link, f"runs/{next(_numbers)}")

"""An S3 server on loopback, behind a link that can be cut in the middle of an upload and repaired.

The server forgets everything when it is stopped, the link nothing: together they are a network that fails, and a
storage that loses its memory.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3

from tests.kit.ports import held_ports

BUCKET = "bucket"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


class Server:
    """`moto_server` on `port`, with an empty bucket; `restart` empties it again."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/moto-api/", timeout=5).close()
                break
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise RuntimeError("moto_server does not start")
            time.sleep(0.05)  # the server reports that it is ready only when it is asked
        self.client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.port}",
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )
        self.client.create_bucket(Bucket=BUCKET)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def forget(self, prefix: str) -> None:
        """Lose what is below `prefix`."""
        for path in self.objects(prefix):
            self.client.delete_object(Bucket=BUCKET, Key=f"{prefix}/{path}")

    def objects(self, prefix: str) -> dict[str, bytes]:
        """What is below `prefix`, by the path from there."""
        found = {}
        for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/"):
            for each in page.get("Contents", []):
                with contextlib.suppress(self.client.exceptions.NoSuchKey):  # removed since it was listed
                    body = self.client.get_object(Bucket=BUCKET, Key=each["Key"])["Body"].read()
                    found[each["Key"].removeprefix(f"{prefix}/")] = body
        return found


class Link:
    """Carries TCP connections to a server, until it is cut."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._sent: set[socket.socket] = set()
        self._left: int | None = None
        self._lock = threading.Lock()
        self.is_cut = threading.Event()
        self._is_over = False
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cut_after(self, sent: int) -> None:
        """Break every connection when `sent` more bytes have gone to the server, and refuse new ones."""
        with self._lock:
            self.is_cut.clear()
            self._left = sent

    def repair(self) -> None:
        with self._lock:
            self._left = None
            self.is_cut.clear()

    def close(self) -> None:
        self._is_over = True
        self._thread.join()
        self._listener.close()

    def _carry(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while not self._is_over:
                for key, _ in selector.select(timeout=0.02):
                    self._move(selector, key.fileobj)
                if self.is_cut.is_set():
                    self._drop(selector, *self._pairs)
            self._drop(selector, *self._pairs)

    def _move(self, selector: selectors.BaseSelector, here: socket.socket) -> None:
        if here is self._listener:
            inside, _ = here.accept()
            if self.is_cut.is_set():
                inside.close()
                return
            with contextlib.suppress(OSError):
                outside = socket.create_connection(("127.0.0.1", self._to))
                self._pairs |= {inside: outside, outside: inside}
                self._sent.add(inside)
                for end in (inside, outside):
                    selector.register(end, selectors.EVENT_READ)
                return
            inside.close()
            return
        if here not in self._pairs:
            return
        try:
            data = here.recv(1 << 16)
            if data and here in self._sent:
                data = self._passed(data)
            self._pairs[here].sendall(data)
        except OSError:
            data = b""
        if not data:
            self._drop(selector, here)

    def _passed(self, data: bytes) -> bytes:
        with self._lock:
            if self._left is None:
                return data
            passed, self._left = data[: self._left], max(0, self._left - len(data))
            if self._left == 0:
                self.is_cut.set()
            return passed

    def _drop(self, selector: selectors.BaseSelector, *ends: socket.socket) -> None:
        for end in ends:
            other = self._pairs.pop(end, None)
            if other is not None:
                self._pairs.pop(other, None)
                for each in (end, other):
                    self._sent.discard(each)
                    selector.unregister(each)
                    each.close()


@contextlib.contextmanager
def serving() -> Iterator[tuple[Server, Link]]:
    with held_ports(1) as [port]:
        server = Server(port)
        try:
            link = Link(server.port)
            try:
                yield server, link
            finally:
                link.close()
        finally:
            server.kill()

"""What tests rely on when they start servers."""

from __future__ import annotations

import socket
from contextlib import ExitStack

from tests.kit.ports import held_ports


def test_server_listens_on_a_held_port():
    with held_ports(1) as [port], socket.create_server(("127.0.0.1", port)) as server:
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        with client, accepted:
            client.sendall(b"here")
            assert accepted.recv(4) == b"here"


def test_no_other_server_is_given_a_held_port():
    with ExitStack() as stack:
        held = stack.enter_context(held_ports(100))
        others = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(800)]
        assert {other.getsockname()[1] for other in others}.isdisjoint(held)

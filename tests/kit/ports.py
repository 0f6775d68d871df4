"""Ports for the servers that tests start."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def held_ports(count: int) -> Iterator[list[int]]:
    """Ports of this host that nothing else gets within the block, where a server may listen on each.

    A port that is only looked up and let go may be given to another process meanwhile, for example to a process group.
    One that a socket is bound to is given to none, and a server that sets SO_REUSEADDR, as they do, can listen there.
    """
    with ExitStack() as stack:
        holders = [stack.enter_context(socket.socket()) for _ in range(count)]
        for holder in holders:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(("", 0))
        yield [holder.getsockname()[1] for holder in holders]

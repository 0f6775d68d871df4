"""Which ranks have arrived at a collective.

A rank that has to wait for a collective signs in with the number of it, in the rendezvous store of the group. When the
time is up, the ranks that did not sign in are those that are missing.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

_GRACE_PERIOD = 3.0  # seconds for ranks that run into their own timeout a little later


def sign_in(group: dist.ProcessGroup, rank: int, number: int) -> None:
    """Record that `rank` has arrived at collective `number` of `group`. **Rank-local**.

    Raises:
        RuntimeError: If the store cannot be reached.
    """
    group.get_group_store().set(_key(rank), str(number))


def absent_ranks(group: dist.ProcessGroup, rank: int, number: int) -> list[int] | None:
    """Return the ranks that have not signed in to collective `number` of `group`. **Rank-local**, takes seconds.

    `None` means that it cannot be known, since no thread can be started.

    Args:
        group: Group of the collective.
        rank: Rank of this process in it. It is signed in too, and never absent.
        number: Number of the collective.
    """
    return _look(group.get_group_store(), rank, group.size(), number, _key, before=lambda: sign_in(group, rank, number))


def unconnected_ranks(store: Store, rank: int, world_size: int, key: str, number: int) -> list[int] | None:
    """Return the ranks that have not come to a meeting in `store`. **Rank-local**, takes seconds; `None` as above.

    Args:
        store: Store in which the ranks meet.
        rank: Rank of this process. It is never absent.
        world_size: Number of ranks.
        key: Start of the keys under which each rank counts its meetings. Its rank is the end.
        number: Number of the meeting.
    """
    return _look(store, rank, world_size, number, lambda other: f"{key}{other}")


def _look(
    store: Store,
    rank: int,
    world_size: int,
    number: int,
    key_of: Callable[[int], str],
    before: Callable[[], None] = lambda: None,
) -> list[int] | None:
    deadline = time.monotonic() + _GRACE_PERIOD
    absent = [other for other in range(world_size) if other != rank]

    def look() -> None:
        # Where the host of the store is gone nothing more can be known.
        with contextlib.suppress(RuntimeError):
            before()
            while absent and time.monotonic() < deadline:
                for other in list(absent):
                    if store.check([key_of(other)]) and int(store.get(key_of(other))) >= number:
                        absent.remove(other)
                time.sleep(0.05)  # the store cannot wait for any of several keys

    # On a thread, because the store waits forever for a host that the network has cut off.
    looking = threading.Thread(target=look, name="keepbest-sign-in", daemon=True)
    try:
        looking.start()
    except RuntimeError:
        return None
    looking.join(_GRACE_PERIOD + 1.0)
    return list(absent)


def _key(rank: int) -> str:
    return f"keepbest/arrived/{rank}"

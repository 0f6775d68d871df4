"""Threads of one process take turns in the calls of what works in one run folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from keepbest.errors import ConfigError
from keepbest.saving.open_run import WorksInRun

C = TypeVar("C", bound=type[WorksInRun])

_PATIENCE = 1800.0  # seconds to wait for the call of another thread; as long as a slow disk may take by default


def in_turn(*names: str) -> Callable[[C], C]:
    """Decorate a class so that its methods of these `names` wait for calls of other threads in the same run.

    A call may make another one on its own thread, as a hook on a new best does.

    Raises:
        ConfigError: By such a method, if another thread does not end its call. It may be waiting for this one.
    """

    def decorate(kind: C) -> C:
        for name in names:
            setattr(kind, name, _waiting(getattr(kind, name)))
        return kind

    return decorate


def _waiting(call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)
    def wait_and_call(self: WorksInRun, *arguments: Any, **settings: Any) -> Any:
        run = self._run
        has_turn = run.turn.acquire(blocking=False)
        # The thread whose turn it was is not in a forked child, where the call itself refuses.
        if not has_turn and not run.is_elsewhere:
            has_turn = run.turn.acquire(timeout=_PATIENCE)
            if not has_turn:
                raise ConfigError(
                    f"another thread has been in a call of a keeper in {run.directory} for {_PATIENCE:.0f} s: call the "
                    "keepers of a run on one thread, and let no hook wait for a thread that calls them"
                )
        try:
            return call(self, *arguments, **settings)
        finally:
            if has_turn:
                run.turn.release()

    return wait_and_call

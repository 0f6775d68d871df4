"""The gloo group of the control plane, and the errors for ranks that do not answer."""

from __future__ import annotations

import os
import time
import weakref
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]  # not in its __all__
from torch.distributed.distributed_c10d import (  # type: ignore[attr-defined]  # not in its __all__
    AllgatherOptions,
    PrefixStore,
    Store,
)

from keepbest.errors import ConfigError, PoisonedError, RankLostError, RankTimeoutError
from keepbest.ranks.attendance import absent_ranks, sign_in
from keepbest.ranks.buffers import Buffers

_PATIENCE_BEFORE_SIGN_IN = timedelta(seconds=1)


class Started(NamedTuple):
    """An all_gather in flight.

    Attributes:
        work: Handle from torch. `None` where there is one rank.
        round: Number of this collective among those of the group.
        time: Moment of the start, in seconds of the monotonic clock.
    """

    work: dist.Work | None
    round: int
    time: float


@dataclass(slots=True)
class ControlGroup:
    """One gloo group for each process group, shared by everything that needs an agreement in it.

    Attributes:
        group: Gloo group. `None` where there is one rank.
        rank: Rank of this process in the group.
        world_size: Number of ranks in the group.
        members: Ranks of the members in the default group.
        poison: Reason why no collective may run any more. `None` as long as they may.
        round: Number of collectives that were started.
        process: Id of the process that is connected. One that was forked from it is alone.
    """

    group: dist.ProcessGroup | None
    rank: int
    world_size: int
    members: tuple[int, ...] = (0,)
    poison: str | None = None
    round: int = 0
    process: int = field(default_factory=os.getpid)
    _store: Store | None = None
    _buffers: Buffers | None = None
    _patient: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, process_group: dist.ProcessGroup | None, timeout: timedelta) -> ControlGroup:
        """Return the control group of `process_group`. **Collective** on first use, which `timeout` bounds.

        Raises:
            ConfigError: If this process is not a member of `process_group`, or torch.distributed is not initialised.
        """
        if not dist.is_initialized():
            if process_group is not None:
                raise ConfigError("process_group was given, but torch.distributed is not initialised")
            return cls(group=None, rank=0, world_size=1)
        parent = dist.group.WORLD if process_group is None else process_group
        if parent is None or dist.get_rank(parent) < 0:
            raise ConfigError(f"global rank {dist.get_rank()} is not a member of the process_group that it passed")
        control = _control_groups.get(parent)
        if control is not None and control.is_inherited:
            return cls(group=None, rank=0, world_size=1)
        if control is None:
            members = dist.get_process_group_ranks(parent)
            control = cls(None, dist.get_rank(parent), len(members), tuple(members))
            if len(members) > 1:
                control._store = parent.get_group_store()
                control.group = control._new_group("control", timeout)
            _control_groups[parent] = control
        return control

    def patient_group(self, timeout: timedelta) -> dist.ProcessGroup | None:
        """Return a second gloo group, with the timeout of the first call. **Collective** on the first call.

        Raises:
            RankLostError: If the ranks cannot be connected.
            PoisonedError: If an earlier failure left the ranks in different places.
        """
        if self.group is not None and self._patient is None:
            self.refuse_if_poisoned()
            try:
                self._patient = self._new_group("patient", timeout)
            except RuntimeError as error:
                raise self._lost("connect the ranks", error) from error
        return self._patient

    def all_gather(self, mine: bytes, step: str, timeout: timedelta) -> list[bytes]:
        """Return every rank's bytes, by rank. **Collective**, one all_gather of the same number of bytes on each rank.

        Raises:
            RankTimeoutError: If a rank does not arrive in time.
            RankLostError: If a rank is gone.
            PoisonedError: If an earlier failure left the ranks in different places.
        """
        if self._buffers is None or len(self._buffers.sent) != len(mine):
            self._buffers = Buffers(len(mine), self.world_size)  # kept, because nearly all exchanges have the same size
        self._buffers.sent[:] = mine
        self.finish(self.start(self._buffers, step, timeout), step, timeout)
        return self._buffers.received()

    def start(self, buffers: Buffers, step: str, timeout: timedelta) -> Started:
        """Start an all_gather of `buffers`. **Collective**. They must stay untouched until `finish`.

        Raises:
            RankLostError: If a rank is gone.
            PoisonedError: If an earlier failure left the ranks in different places.
        """
        self.refuse_if_poisoned()
        if self.group is None:
            buffers.rows[0].copy_(buffers.row)
            return Started(None, 0, time.monotonic())
        self.round += 1
        options = AllgatherOptions()
        options.timeout = timeout
        started = time.monotonic()  # before gloo begins to count
        try:
            work = self.group.allgather([buffers.rows], [buffers.row], options)
        except RuntimeError as error:
            raise self._lost(step, error) from error
        return Started(work, self.round, started)

    def finish(self, started: Started, step: str, timeout: timedelta) -> None:
        """Wait until an all_gather has arrived from all ranks. **Collective**.

        Raises:
            RankTimeoutError: If a rank does not arrive in time.
            RankLostError: If a rank is gone.
        """
        if self.group is None or started.work is None:
            return
        try:
            if not _finished_within(started.work, min(timeout, _PATIENCE_BEFORE_SIGN_IN)):
                # Only ranks that have to wait sign in, so that a quiet interval does not use the store.
                sign_in(self.group, self.rank, self.round)
                started.work.wait()
        except RuntimeError as error:
            if time.monotonic() - started.time >= timeout.total_seconds():
                raise self._timed_out(self.group, started.round, step, timeout) from error
            raise self._lost(step, error) from error

    def refuse_if_poisoned(self) -> None:
        """Raise `PoisonedError` if no collective may run any more, or none in this process."""
        if self.is_inherited:
            raise PoisonedError(
                f"process {os.getpid()} was forked from process {self.process}, which is connected with the other "
                "ranks: a forked process cannot use its connections"
            )
        if self.poison is not None:
            raise PoisonedError(
                f"rank {self.rank} of {self.world_size} runs no more collectives: {self.poison}. "
                "Restart the job. Everything that was committed is safe."
            )

    @property
    def is_inherited(self) -> bool:
        """Whether this process was forked from the one that is connected."""
        return self.group is not None and self.process != os.getpid()

    def new_store(self, purpose: str) -> Store:
        """Return a store that the members alone use. **Rank-local**; equally often on each, so that they meet in it."""
        if self._store is None:
            self._store = HashStore()  # one rank meets itself
        number = self._store.add(f"keepbest/{purpose}/{self.rank}", 1)
        return PrefixStore(f"keepbest/{purpose}/{number}", self._store)

    def _new_group(self, purpose: str, timeout: timedelta) -> dist.ProcessGroup:
        """Return a new gloo group of the members, which is freed with the last reference to it. **Collective**.

        torch would keep one from `new_group` in its tables. It also names those after the number of groups of each
        rank: ranks with different numbers would not meet, and a name would come again, with old addresses in the store.
        """
        store = self.new_store(purpose)
        group = dist.ProcessGroup(store, self.rank, self.world_size)
        gloo = dist.ProcessGroupGloo(store, self.rank, self.world_size, timeout)
        # torch has no other way to a group that it does not keep.
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)  # noqa: SLF001
        return group

    def _lost(self, step: str, error: RuntimeError) -> RankLostError:
        self._poison_by_lost_contact(step)
        return RankLostError(
            f"rank {self.rank} of {self.world_size} lost contact with another rank in step '{step}': {error}. "
            "A process has probably died: look for the first error in the output of the other ranks."
        )

    def _timed_out(self, group: dist.ProcessGroup, number: int, step: str, timeout: timedelta) -> RankTimeoutError:
        self._poison_by_lost_contact(step)
        absent = absent_ranks(group, self.rank, number)
        unknown = "no thread to look for them can be started" if absent is None else "all reached the step in the end"
        names = ", ".join(map(str, absent)) if absent else f"unknown ({unknown})"
        return RankTimeoutError(
            f"rank {self.rank} of {self.world_size} waited {timeout.total_seconds():g} s in step '{step}'; "
            f"ranks that did not arrive: {names}. Every rank must make the same calls. "
            "Raise rank_timeout (or save_timeout for slow storage) if they only need more time."
        )

    def _poison_by_lost_contact(self, step: str) -> None:
        self.poison = f"contact with the other ranks was lost in step '{step}'"


# One control group per process group: a second one would cost a mesh of connections and separate nothing. It goes when
# the process group is destroyed, and nobody uses it any more.
_control_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, ControlGroup] = weakref.WeakKeyDictionary()


def _finished_within(work: dist.Work, timeout: timedelta) -> bool:
    try:
        work.wait(timeout)
    except RuntimeError:
        if work.is_completed():
            raise
        return False
    return True

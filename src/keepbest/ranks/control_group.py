"""The gloo group of the control plane, and the errors for ranks that do not answer."""

from __future__ import annotations

import logging
import os
import time
import weakref
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]  # not in its __all__
from torch.distributed.distributed_c10d import PrefixStore, Store

from keepbest.errors import ConfigError, PoisonedError, RankLostError, RanksError, RankTimeoutError
from keepbest.ranks.attendance import unconnected_ranks
from keepbest.ranks.buffers import Buffers
from keepbest.ranks.carrier import Alone, Carrier, InFlight, has_lost, is_of_gloo
from keepbest.ranks.direct import Direct
from keepbest.ranks.ring import Ring
from keepbest.ranks.watch import Watch

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class ControlGroup:
    """One gloo group for each process group, shared by everything that needs an agreement in it.

    Attributes:
        group: Gloo group. `None` where there is one rank.
        rank: Rank of this process in the group.
        world_size: Number of ranks in the group.
        members: Ranks of the members in the default group.
        poison: Reason why no collective may run any more. `None` as long as they may.
        round: Number of exchanges that were started.
        process: Id of the process that is connected. One that was forked from it is alone.
        is_early: Whether torch.distributed was not initialised yet, so that this process counts as the only one.
    """

    group: dist.ProcessGroup | None
    rank: int
    world_size: int
    members: tuple[int, ...] = (0,)
    poison: str | None = None
    round: int = 0
    process: int = field(default_factory=os.getpid)
    is_early: bool = False
    _carrier: Carrier = field(default_factory=Alone)
    _gloo: dist.ProcessGroupGloo | None = None
    _store: Store | None = None
    _buffers: Buffers | None = None
    _patient: dist.ProcessGroup | None = None
    _watch: Watch = field(default_factory=lambda: Watch(0, 1, Alone()))

    @classmethod
    def of(cls, process_group: dist.ProcessGroup | None, timeout: timedelta) -> ControlGroup:
        """Return the control group of `process_group`. **Collective** on first use, which `timeout` bounds.

        Raises:
            ConfigError: If this process is not a member of `process_group`, or torch.distributed is not initialised.
            RankTimeoutError: If a rank does not come to connect. Names it.
            RankLostError: If the ranks cannot be connected.
        """
        if not dist.is_initialized():
            if process_group is not None:
                raise ConfigError("process_group was given, but torch.distributed is not initialised")
            return cls(group=None, rank=0, world_size=1, is_early=True)
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
                control.group, gloo = control._new_group("control", timeout)
                control._gloo, rank = gloo, control.rank
                control._carrier = Direct(gloo, rank) if len(members) == 2 else Ring(control.group, rank)
                control._watch = Watch(rank, len(members), control._carrier)
                control._watch.begin()
            _control_groups[parent] = control
        return control

    def check_alone(self) -> None:
        """Warn, or refuse, where this process would work alone although there are other ranks. **Rank-local**.

        Raises:
            ConfigError: If torch.distributed has connected it with them since it joined.
        """
        if not self.is_early:
            return
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise ConfigError(
                f"this keeper was created before torch.distributed was initialised, so that rank {dist.get_rank()} of "
                f"{dist.get_world_size()} would keep a run alone: create it after init_process_group(), on every rank"
            )
        rank, world_size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
        if rank and world_size not in ("", "1") and not dist.is_initialized():
            _logger.warning(
                "RANK is %s and WORLD_SIZE is %s, but torch.distributed is not initialised, so each process keeps "
                "a run alone; to keep one together, call init_process_group() before the keeper is created",
                rank,
                world_size,
            )

    def patient_group(self, timeout: timedelta) -> dist.ProcessGroup | None:
        """Return a second gloo group, with the timeout of the first call. **Collective** on the first call.

        Raises:
            RankTimeoutError: If a rank does not come to connect. Names it.
            RankLostError: If the ranks cannot be connected.
            PoisonedError: If an earlier failure left the ranks in different places.
        """
        if self.group is not None and self._patient is None:
            self.refuse_if_poisoned()
            self._patient, _ = self._new_group("patient", timeout)
        return self._patient

    def all_gather(self, mine: bytes, step: str, timeout: timedelta) -> list[bytes]:
        """Return every rank's bytes, by rank. **Collective**; the same number of bytes on each rank.

        Raises:
            RankTimeoutError: If a rank does not arrive in time.
            RankLostError: If a rank is gone.
            PoisonedError: If an earlier failure left the ranks in different places.
        """
        kept = self._buffers
        if kept is None or kept.size != len(mine):
            buffers = Buffers(len(mine), self.world_size)
        else:
            # Not where one is interrupted, and still under way.
            buffers, self._buffers = kept, None
        buffers.sent.data[:] = mine
        self.finish(self.start(buffers, step, timeout), step, timeout)
        received = buffers.received()
        # Those of the first exchange, because nearly all have its size.
        self._buffers = self._buffers or buffers
        return received

    def start(self, buffers: Buffers, step: str, timeout: timedelta) -> InFlight:
        """Start an exchange of `buffers`. **Collective**. They must stay untouched until `finish`.

        Raises:
            RankLostError: If a rank is gone.
            PoisonedError: If an earlier failure left the ranks in different places.
        """
        self.refuse_if_poisoned()
        self.round += 1
        flight = InFlight(buffers, self.round, step)
        try:
            # What begins in one session of torch.profiler may end in another one, which would write into memory that
            # torch has freed. So no session sees it.
            torch.autograd._enable_record_function(False)  # type: ignore[attr-defined]  # noqa: SLF001  # see ADR 10
            self._carrier.start(flight, timeout)
        except BaseException as error:
            if is_of_gloo(error):
                raise self._lost(step, error) from error
            if self.group is not None and not flight.is_under_way:
                self.poison = f"it was interrupted while it sent its part of step '{step}'"
            raise
        finally:
            torch.autograd._enable_record_function(True)  # type: ignore[attr-defined]  # noqa: SLF001  # as above
        return flight

    def finish(self, flight: InFlight, step: str, timeout: timedelta) -> None:
        """Wait until an exchange has arrived from all ranks. **Collective**.

        Raises:
            RankTimeoutError: If a rank does not arrive in time.
            RankLostError: If a rank is gone.
        """
        self._watch.present = flight
        try:
            self._carrier.wait(flight, timeout)
        except RuntimeError as error:
            if not is_of_gloo(error):
                raise
            if time.monotonic() - flight.started >= timeout.total_seconds():
                raise self._timed_out(flight, step, timeout) from error
            raise self._lost(step, error) from error
        finally:
            self._watch.present = None

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

    def has_lost(self, rank: int) -> bool:
        """Whether the connection with `rank` is known to be broken. **Rank-local**, from any thread."""
        return self._gloo is not None and has_lost(self._gloo, rank)

    @property
    def is_inherited(self) -> bool:
        """Whether this process was forked from the one that is connected."""
        return self.group is not None and self.process != os.getpid()

    def new_store(self, purpose: str) -> Store:
        """Return a store that the members alone use. **Rank-local**; equally often on each, so that they meet in it."""
        return self._number_store(purpose)[0]

    def _number_store(self, purpose: str) -> tuple[Store, int]:
        if self._store is None:
            self._store = HashStore()  # one rank meets itself
        number = self._store.add(f"keepbest/{purpose}/{self.rank}", 1)
        return PrefixStore(f"keepbest/{purpose}/{number}", self._store), number

    def _new_group(self, purpose: str, timeout: timedelta) -> tuple[dist.ProcessGroup, dist.ProcessGroupGloo]:
        """Return a new gloo group of the members, which is freed with the last reference to it, and its backend.

        **Collective**.

        torch would keep one from `new_group` in its tables. It also names those after the number of groups of each
        rank: ranks with different numbers would not meet, and a name would come again, with old addresses in the store.
        """
        store, number = self._number_store(purpose)
        group = dist.ProcessGroup(store, self.rank, self.world_size)
        try:
            gloo = dist.ProcessGroupGloo(store, self.rank, self.world_size, timeout)
        except RuntimeError as error:
            raise self._unconnected(purpose, number, timeout, error) from error
        # torch has no other way to a group that it does not keep.
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)  # noqa: SLF001
        return group, gloo

    def _unconnected(self, purpose: str, number: int, timeout: timedelta, error: RuntimeError) -> RanksError:
        store, step = self._store, "connect the ranks"
        absent = store and unconnected_ranks(store, self.rank, self.world_size, f"keepbest/{purpose}/", number)
        if not absent:
            return self._lost(step, error)
        self._poison_by_lost_contact(step)
        return RankTimeoutError(
            f"rank {self.rank} of {self.world_size} waited {timeout.total_seconds():g} s to connect with the others; "
            f"ranks that did not arrive: {', '.join(map(str, absent))}. Create a keeper, or call load, on every rank "
            "and not on some of them. Raise rank_timeout if they only need more time."
        )

    def _lost(self, step: str, error: BaseException) -> RankLostError:
        self._poison_by_lost_contact(step)
        return RankLostError(
            f"rank {self.rank} of {self.world_size} lost contact with another rank in step '{step}': {error}. "
            "A process has probably died: look for the first error in the output of the other ranks."
        )

    def _timed_out(self, flight: InFlight, step: str, timeout: timedelta) -> RankTimeoutError:
        self._poison_by_lost_contact(step)
        absent = self._carrier.absent(flight)
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

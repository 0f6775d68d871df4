"""The gloo group of the control plane, and what becomes of a rank that does not answer."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions  # type: ignore[attr-defined]  # not in its __all__

from keepbest.errors import ConfigError, PoisonedError, RankLostError, RankTimeoutError

_PATIENCE_BEFORE_SIGN_IN = timedelta(seconds=1)
_GRACE_FOR_SIGN_INS = 3.0


class Frames:
    """Memory of one all_gather: what this rank sends, and what all of them sent.

    Args:
        size: bytes that each rank sends.
        world_size: number of ranks.
    """

    def __init__(self, size: int, world_size: int) -> None:
        self.sent = bytearray(size)
        self.row = torch.frombuffer(self.sent, dtype=torch.uint8)
        self._gathered = [bytearray(size) for _ in range(world_size)]
        self.rows = [torch.frombuffer(row, dtype=torch.uint8) for row in self._gathered]

    def received(self) -> list[bytes]:
        """What the ranks sent, by rank."""
        return [bytes(row) for row in self._gathered]


class Started(NamedTuple):
    """An all_gather that is under way.

    Attributes:
        work: of torch; `None` where there is one rank.
        round: its number among those of the group.
        time: when it was started, in seconds.
    """

    work: dist.Work | None
    round: int
    time: float


@dataclass(slots=True)
class ControlGroup:
    """One gloo group for each process group, shared by everybody who agrees on something in it.

    Attributes:
        group: `None` where there is one rank.
        rank: of this process in it.
        world_size: number of its ranks.
        members: their ranks in the default group.
        poison: why no collective may run any more, if so.
        round: number of collectives that were started.
    """

    group: dist.ProcessGroup | None
    rank: int
    world_size: int
    members: tuple[int, ...] = (0,)
    poison: str | None = None
    round: int = 0
    _frames: Frames | None = None
    _patient: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, process_group: dist.ProcessGroup | None, timeout: timedelta) -> ControlGroup:
        """The one for `process_group`. **Collective** where it is made; `timeout` bounds that.

        Raises:
            ConfigError: if this process is not in `process_group`.
        """
        if not dist.is_initialized():
            if process_group is not None:
                raise ConfigError("process_group was given, but torch.distributed is not initialised")
            return cls(group=None, rank=0, world_size=1)
        parent = dist.group.WORLD if process_group is None else process_group
        if parent is None or dist.get_rank(parent) < 0:
            raise ConfigError(f"global rank {dist.get_rank()} is not a member of the process_group that it passed")
        control = _control_groups.get(parent)
        if control is None:
            members = dist.get_process_group_ranks(parent)
            group = _new_group(members, timeout) if len(members) > 1 else None
            control = cls(group, dist.get_rank(parent), len(members), tuple(members))
            _control_groups[parent] = control
        return control

    def patient_group(self, timeout: timedelta) -> dist.ProcessGroup | None:
        """A second gloo group, whose own timeout is that of the first call. **Collective** then.

        Raises:
            RankLostError: if the ranks cannot be connected.
            PoisonedError: as `all_gather`.
        """
        if self.group is not None and self._patient is None:
            self.refuse_if_poisoned()
            try:
                self._patient = _new_group(list(self.members), timeout)
            except RuntimeError as error:
                raise self._lost("connect the ranks", error) from error
        return self._patient

    def all_gather(self, mine: bytes, step: str, timeout: timedelta) -> list[bytes]:
        """Every rank's bytes, by rank; all of them give equally many. **Collective**, one all_gather.

        Raises:
            RankTimeoutError: if a rank does not arrive in time.
            RankLostError: if a rank is gone.
            PoisonedError: if an earlier failure left the ranks in different places.
        """
        if self._frames is None or len(self._frames.sent) != len(mine):
            self._frames = Frames(len(mine), self.world_size)  # kept, since nearly all exchanges have the same size
        self._frames.sent[:] = mine
        self.finish(self.start(self._frames, step, timeout), step, timeout)
        return self._frames.received()

    def start(self, frames: Frames, step: str, timeout: timedelta) -> Started:
        """Start an all_gather of `frames`. **Collective**; to be finished, and the frames left alone until then.

        Raises:
            RankLostError, PoisonedError: as `all_gather`.
        """
        self.refuse_if_poisoned()
        if self.group is None:
            frames.rows[0].copy_(frames.row)
            return Started(None, 0, time.monotonic())
        self.round += 1
        options = AllgatherOptions()
        options.timeout = timeout
        started = time.monotonic()  # before gloo begins to count
        try:
            work = self.group.allgather([frames.rows], [frames.row], options)
        except RuntimeError as error:
            raise self._lost(step, error) from error
        return Started(work, self.round, started)

    def finish(self, started: Started, step: str, timeout: timedelta) -> None:
        """Wait until what was started has arrived from all ranks. Raises as `all_gather`."""
        if self.group is None or started.work is None:
            return
        try:
            if not _finished_within(started.work, min(timeout, _PATIENCE_BEFORE_SIGN_IN)):
                self._sign_in(self.group)
                started.work.wait()
        except RuntimeError as error:
            if time.monotonic() - started.time >= timeout.total_seconds():
                raise self._timed_out(self.group, started.round, step, timeout) from error
            raise self._lost(step, error) from error

    def refuse_if_poisoned(self) -> None:
        """Raise `PoisonedError` if no collective may run any more."""
        if self.poison is not None:
            raise PoisonedError(
                f"rank {self.rank} of {self.world_size} runs no more collectives: {self.poison}. "
                "Restart the job; what was committed is safe."
            )

    def _lost(self, step: str, error: RuntimeError) -> RankLostError:
        self._poison_by_lost_contact(step)
        return RankLostError(
            f"rank {self.rank} of {self.world_size} lost contact with another rank in step '{step}': {error}. "
            "A process has probably died: look for the first error in the other ranks' output."
        )

    def _timed_out(self, group: dist.ProcessGroup, number: int, step: str, timeout: timedelta) -> RankTimeoutError:
        self._poison_by_lost_contact(step)
        absent = self._ranks_that_did_not_sign_in(group, number)
        names = ", ".join(map(str, absent)) if absent else "unknown (all of them reached the step in the end)"
        return RankTimeoutError(
            f"rank {self.rank} of {self.world_size} waited {timeout.total_seconds():g} s in step '{step}'; "
            f"ranks that did not arrive: {names}. Every rank must make the same calls; "
            "raise rank_timeout (or save_timeout for slow storage) if they only need more time."
        )

    def _poison_by_lost_contact(self, step: str) -> None:
        self.poison = f"contact with the other ranks was lost in step '{step}'"

    def _sign_in(self, group: dist.ProcessGroup) -> None:
        # Only who has to wait does this, so that a quiet interval costs no talk with the store.
        group.get_group_store().set(f"keepbest/arrived/{self.rank}", str(self.round))

    def _ranks_that_did_not_sign_in(self, group: dist.ProcessGroup, number: int) -> list[int]:
        store = group.get_group_store()
        deadline = time.monotonic() + _GRACE_FOR_SIGN_INS
        absent = [rank for rank in range(self.world_size) if rank != self.rank]

        def look() -> None:
            # Where the host of the store is gone nothing more can be known.
            with contextlib.suppress(RuntimeError):
                self._sign_in(group)
                while absent and time.monotonic() < deadline:
                    for rank in list(absent):
                        key = f"keepbest/arrived/{rank}"
                        if store.check([key]) and int(store.get(key)) >= number:
                            absent.remove(rank)
                    time.sleep(0.05)  # the store cannot wait for any of several keys

        # On a thread, since the store waits for its host for ever where the network has swallowed it.
        looking = threading.Thread(target=look, name="keepbest-sign-in", daemon=True)
        looking.start()
        looking.join(_GRACE_FOR_SIGN_INS + 1.0)
        return list(absent)


# One control group per process group: a second one would cost a mesh of connections and bring no separation.
_control_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, ControlGroup] = weakref.WeakKeyDictionary()


def _new_group(members: list[int], timeout: timedelta) -> dist.ProcessGroup:
    apart = len(members) != dist.get_world_size()
    group: dist.ProcessGroup = dist.new_group(members, backend="gloo", timeout=timeout, use_local_synchronization=apart)
    return group


def _finished_within(work: dist.Work, timeout: timedelta) -> bool:
    try:
        work.wait(timeout)
    except RuntimeError:
        if work.is_completed():
            raise
        return False
    return True

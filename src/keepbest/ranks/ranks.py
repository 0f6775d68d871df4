"""`Ranks`: how the ranks agree.

Every method that talks does it with one `all_gather` of a fixed-size frame over a gloo group of our own, so that two
ranks that are in different steps still understand each other well enough to say so. Only where a frame announces a text
(an error, a JSON value) a second `all_gather` follows, and every rank knows that from the frames.

World size 1, with or without an initialised process group, goes through the same calls and sends nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch.distributed as dist

from keepbest import errors
from keepbest.errors import ConfigError, DesyncError, KeepBestError, RankFailedError, StorageError
from keepbest.ranks.control_group import ControlGroup
from keepbest.ranks.flag import SharedFlag

T = TypeVar("T")

_FRAME = struct.Struct("<16s?Q?d?d5x")


class Number(NamedTuple):
    """What one rank holds of a number: value and weight are float64; `None` where the rank has none.

    A `note` is for the other ranks to read; it costs a second exchange, where a rank has one.
    """

    value: float | None
    weight: float | None
    note: str = ""


class _Frame(NamedTuple):
    step: bytes
    failed: bool
    text_bytes: int
    has_value: bool
    value: float
    has_weight: bool
    weight: float


class Ranks:
    """This process among the ranks that keep one run together.

    Attributes:
        rank: of this process within its process group; 0 without one.
        world_size: number of ranks in the process group; 1 without one.
        members: their ranks in the default group, in order.
        process_group: the data-plane group that was passed to `connect`; `None` is the default group.
    """

    def __init__(
        self,
        control: ControlGroup,
        *,
        process_group: dist.ProcessGroup | None,
        rank_timeout: timedelta,
        save_timeout: timedelta,
    ) -> None:
        self._control = control
        self._rank_timeout = rank_timeout
        self._save_timeout = save_timeout
        self.process_group = process_group
        self.rank = control.rank
        self.world_size = control.world_size
        self.members = list(control.members)

    @classmethod
    def connect(
        cls,
        process_group: dist.ProcessGroup | None = None,
        *,
        rank_timeout: float = 120.0,
        save_timeout: float = 1800.0,
    ) -> Ranks:
        """Join the control plane of `process_group` (the default group, or none at all). **Collective** on first use.

        Args:
            process_group: whose ranks agree with each other; the calling process must be a member.
            rank_timeout: seconds that ranks wait for each other at an agreement.
            save_timeout: seconds that ranks wait for rank 0 to finish a write; at least `rank_timeout`.

        Raises:
            ConfigError: if a timeout is not a positive number, or this process is not in `process_group`.
        """
        for name, seconds in (("rank_timeout", rank_timeout), ("save_timeout", save_timeout)):
            if not 0 < seconds < math.inf:
                raise ConfigError(f"{name} must be a positive number of seconds, got {seconds!r}")
        timeouts = timedelta(seconds=rank_timeout), timedelta(seconds=max(rank_timeout, save_timeout))
        return cls(
            ControlGroup.of(process_group, timeouts[0]),
            process_group=process_group,
            rank_timeout=timeouts[0],
            save_timeout=timeouts[1],
        )

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that reads and writes the run folder."""
        return self.rank == 0

    @property
    def control_group(self) -> dist.ProcessGroup | None:
        """The gloo group of the control plane; `None` where there is one rank."""
        return self._control.group

    def patient_group(self) -> dist.ProcessGroup | None:
        """A gloo group for collectives of others, in which ranks wait for `save_timeout`. **Collective** at first.

        `None` where there is one rank.

        Raises:
            RankLostError: if the ranks cannot be connected.
            PoisonedError: see `exchange`.
        """
        return self._control.patient_group(self._save_timeout)

    def agree(
        self,
        step: str,
        work: Callable[[], T],
        *,
        remedy: str = "",
        state: Callable[[T], bytes] = lambda _: b"",
        saving: bool = False,
    ) -> T:
        """Do `work` on this rank and make its failure everybody's. **Collective**, one exchange.

        Args:
            step: what is being done, in words; the same on every rank.
            work: rank-local and free of collectives.
            remedy: what the user can do if the file system refuses.
            state: from the result of `work` to bytes that must be equal on all ranks.
            saving: wait with `save_timeout` rather than `rank_timeout`.

        Returns:
            What `work` returned on this rank.

        Raises:
            KeepBestError: on every rank if any rank failed: of the class that the lowest failing rank raised if that
                is one of ours, else `RankFailedError` (`StorageError` where the file system refused).
            RankTimeoutError, DesyncError, PoisonedError: see `exchange`.
        """

        def work_and_state() -> tuple[T, bytes]:
            return (result := work()), state(result)

        outcome, failure = self._attempt(work_and_state)
        held = b"" if outcome is None else outcome[1]
        self.exchange(step, Number(None, None), failure=failure, remedy=remedy, state=held, saving=saving)
        return outcome[0]  # type: ignore[index]  # exchange raised if there is no outcome

    def broadcast(self, step: str, work: Callable[[], Any], *, remedy: str = "", saving: bool = False) -> Any:
        """Do `work` on rank 0 and hand its JSON value to every rank. **Collective**. Raises as `agree` does."""
        mine = work if self.is_main else lambda: None
        return self.gather_json(step, mine, remedy=remedy, saving=saving)[0]

    def gather_json(self, step: str, work: Callable[[], Any], *, remedy: str = "", saving: bool = False) -> list[Any]:
        """Do `work` on every rank and hand every rank all JSON values, by rank. **Collective**. Raises as `agree`."""
        text, failure = self._attempt(lambda: json.dumps(work()))
        frames = self._meet(step, Number(None, None), failure=failure, remedy=remedy, text=text or "", saving=saving)
        return [json.loads(text) for text in self._texts(text or "", frames, saving=saving)]

    def exchange(
        self,
        step: str,
        number: Number,
        *,
        failure: BaseException | None = None,
        remedy: str = "",
        state: bytes = b"",
        saving: bool = False,
    ) -> list[Number]:
        """Show every rank everybody's number. **Collective**: one all_gather where nobody failed or has a note.

        Args:
            step: as in `agree`.
            number: what this rank holds.
            failure: something that went wrong on this rank before; every rank raises it.
            remedy: as in `agree`.
            state: as in `agree`.
            saving: as in `agree`.

        Returns:
            The numbers by rank; the same float64 bits on every rank.

        Raises:
            KeepBestError: see `agree`.
            RankTimeoutError: a rank did not arrive in time; names those that did not, as far as can be known.
            DesyncError: ranks are in different steps or hold a different `state`.
            PoisonedError: an earlier failure left the ranks in different places.
        """
        note = number.note
        frames = self._meet(step, number, failure=failure, remedy=remedy, state=state, text=note, saving=saving)
        notes = self._texts(note, frames, saving=saving)
        return [
            Number(frame.value if frame.has_value else None, frame.weight if frame.has_weight else None, note)
            for frame, note in zip(frames, notes, strict=True)
        ]

    def flag(self) -> SharedFlag:
        """A new flag, that is not raised. **Rank-local**; every rank makes one, and polls it as often as the others."""
        return SharedFlag(self._control, self._save_timeout)

    def poison(self, reason: str) -> None:
        """Refuse all further collectives: this rank left the others in the middle of one. **Rank-local**."""
        self._control.poison = self._control.poison or reason

    def lose(self, step: str, error: BaseException) -> NoReturn:
        """Raise for an `error` that may have left the others in the middle of a collective. **Rank-local**.

        Raises:
            RankFailedError: which names this rank and the step; or `error` itself, where it is one of ours or an
                interruption. No collective may run any more.
        """
        told = f"failed to {step}: {type(error).__name__}: {error}"
        if self.world_size > 1:
            self.poison(told)
        if isinstance(error, KeepBestError) or not isinstance(error, Exception):
            raise error
        raise RankFailedError(f"rank {self.rank} of {self.world_size} {told}") from error

    def _attempt(self, work: Callable[[], T]) -> tuple[T | None, BaseException | None]:
        # Not even this rank's interruption may leave the others waiting: it is told, then raised again.
        self._control.refuse_if_poisoned()
        try:
            return work(), None
        except BaseException as error:  # noqa: BLE001  # raised again by _meet, on every rank
            return None, error

    def _meet(
        self,
        step: str,
        number: Number,
        *,
        failure: BaseException | None,
        remedy: str,
        state: bytes = b"",
        text: str = "",
        saving: bool,
    ) -> list[_Frame]:
        report = text if failure is None else _report(step, failure, remedy)
        key = hashlib.blake2b(step.encode(errors="surrogatepass") + b"\0" + state, digest_size=16).digest()
        value, weight, _ = number
        mine = _FRAME.pack(
            key,
            failure is not None,
            len(report.encode()),
            value is not None,
            0.0 if value is None else value,
            weight is not None,
            0.0 if weight is None else weight,
        )
        frames = [_Frame._make(_FRAME.unpack(raw)) for raw in self._all_gather(mine, step, saving=saving)]
        # A failure explains why steps differ, so it comes first.
        if any(other.failed for other in frames):
            self._raise_failures(failure, self._texts(report, frames, saving=saving), frames)
        if any(other.step != key for other in frames):
            self._raise_desync(step, state, saving)
        return frames

    def _texts(self, mine: str, frames: list[_Frame], *, saving: bool) -> list[str]:
        longest = max([frame.text_bytes for frame in frames])
        if not longest:
            return [""] * self.world_size
        padded = mine.encode().ljust(longest, b"\0")
        texts = self._all_gather(padded, "exchange texts", saving=saving)
        return [text[: frame.text_bytes].decode() for text, frame in zip(texts, frames, strict=True)]

    def _raise_failures(self, mine: BaseException | None, texts: list[str], frames: list[_Frame]) -> None:
        if mine is not None and not isinstance(mine, Exception):
            raise mine
        reports = {rank: json.loads(texts[rank]) for rank, frame in enumerate(frames) if frame.failed}
        first = next(iter(reports.values()))
        kind = getattr(errors, first["type"], None)
        ours: type[KeepBestError] | None = kind if isinstance(kind, type) and issubclass(kind, KeepBestError) else None
        otherwise = StorageError if first["refused"] else RankFailedError
        shared = len(reports) == self.world_size and all(report == first for report in reports.values())
        if ours is not None and mine is not None and shared:
            raise mine
        told = "; ".join(
            f"rank {rank} of {self.world_size}: {report['type']}: {report['message']}"
            for rank, report in reports.items()
        )
        remedy = f". {first['remedy']}" if first["refused"] and first["remedy"] else ""
        raise (ours or otherwise)(f"failed to {first['step']} on {told}{remedy}") from mine

    def _raise_desync(self, step: str, state: bytes, saving: bool) -> None:
        width = 1024
        mine = f"{step} {state.decode(errors='replace')}".strip().encode(errors="replace")[:width].ljust(width, b"\0")
        told = [text.rstrip(b"\0").decode(errors="replace") for text in self._all_gather(mine, step, saving=saving)]
        self.poison("the ranks are not in the same step")
        lines = "\n".join(f"  rank {rank}: {text}" for rank, text in enumerate(told))
        raise DesyncError(
            f"the ranks are not in the same place:\n{lines}\n"
            "Call the keeper on every rank, in the same order, with the same settings and iterations."
        )

    def _all_gather(self, mine: bytes, step: str, *, saving: bool) -> list[bytes]:
        return self._control.all_gather(mine, step, self._save_timeout if saving else self._rank_timeout)


def _report(step: str, failure: BaseException, remedy: str) -> str:
    return json.dumps(
        {
            "step": step,
            "type": type(failure).__name__,
            "message": str(failure),
            "remedy": remedy,
            "refused": isinstance(failure, OSError) and not isinstance(failure, KeepBestError),
        }
    )

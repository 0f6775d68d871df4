"""`Ranks`: how the ranks agree.

Every collective method exchanges frames of a fixed size over a gloo group of our own, so that two ranks in different
steps still understand each other well enough to report it. Only if a frame announces a text (an error, a JSON value)
does a second exchange follow, and every rank knows that from the frames.

World size 1, with or without an initialised process group, uses the same calls and sends nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

from keepbest.errors import ConfigError, DesyncError, KeepBestError, RankFailedError, RanksError
from keepbest.ranks.control_group import ControlGroup
from keepbest.ranks.difference import SEPARATOR, describe_difference
from keepbest.ranks.failure import FailureReport, cause_of, shared_error, text_of
from keepbest.ranks.flag import FLAG_PLACE, SharedFlag, not_all_poll
from keepbest.ranks.frame import FRAME_BYTES, Frame, Number, digest_place
from keepbest.ranks.mailbox import Mailbox

T = TypeVar("T")

LONGEST_TIMEOUT = 1e9
"""Seconds that the clocks of torch can count. It is 30 years."""

_PLACE_WIDTH = 16384  # bytes of a step and its state that ranks in different places show each other
_PATIENCE_FOR_NOTES = 0.9  # of save_timeout, so that who waits for rank 0 meanwhile learns how it ends


class Ranks:
    """This process among the ranks that keep one run together.

    Attributes:
        rank: Rank of this process within its process group. 0 without one.
        world_size: Number of ranks in the process group. 1 without one.
        members: Ranks of the members in the default group, in order.
        process_group: Data-plane group that was passed to `connect`. `None` is the default group.
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
        self._rank_timeout, self._save_timeout = rank_timeout, save_timeout
        self.process_group = process_group
        self.rank, self.world_size = control.rank, control.world_size
        self.members = list(control.members)
        self._mailbox: Mailbox | None = None

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
            process_group: Group whose ranks agree with each other. The calling process must be a member.
            rank_timeout: Seconds that ranks wait for each other at an agreement.
            save_timeout: Seconds that ranks wait for rank 0 to finish a write; at least `rank_timeout`.

        Raises:
            ConfigError: If a timeout is not a positive number, or this process is not in `process_group`.
        """
        for name, seconds in (("rank_timeout", rank_timeout), ("save_timeout", save_timeout)):
            if not 0 < seconds <= LONGEST_TIMEOUT:
                most = f"at most {LONGEST_TIMEOUT:,.0f}"
                raise ConfigError(f"{name} must be a positive number of seconds, {most}, got {seconds!r}")
        timeouts = timedelta(seconds=rank_timeout), timedelta(seconds=max(rank_timeout, save_timeout))
        return cls(
            ControlGroup.of(process_group, timeouts[0]),
            process_group=process_group,
            rank_timeout=timeouts[0],
            save_timeout=timeouts[1],
        )

    def check_alone(self) -> None:
        """Refuse to work alone if `connect` came too early, or warn if there seem to be other ranks. **Rank-local**.

        Raises:
            ConfigError: If torch.distributed was initialised with several ranks after `connect`.
        """
        self._control.check_alone()

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that reads and writes the run folder."""
        return self.rank == 0

    @property
    def control_group(self) -> dist.ProcessGroup | None:
        """The gloo group of the control plane; `None` where there is one rank.

        torch keeps no table of it. So where a function of torch.distributed fails in it, `lose` finds the cause.
        """
        return self._control.group

    def patient_group(self) -> dist.ProcessGroup | None:
        """Return a gloo group for collectives of other libraries, in which ranks wait for `save_timeout`.

        **Collective** on the first call. `None` where there is one rank.

        Raises:
            RankLostError: If the ranks cannot be connected.
            PoisonedError: If an earlier failure left the ranks in different places.
        """
        return self._control.patient_group(self._save_timeout)

    def agree(
        self,
        step: str,
        work: Callable[[], T],
        *,
        remedy: str | None = None,
        state: Callable[[T], bytes] = lambda _: b"",
        saving: bool = False,
    ) -> T:
        """Do `work` on this rank, and raise its failure on every rank. **Collective**, one exchange.

        Args:
            step: Description of the work, in words. The same on every rank.
            work: Function that is rank-local and runs no collective.
            remedy: What the user can do if the file system refuses. `None` where no file of the run is used, so that an
                `OSError` is one of the code of the user.
            state: Function from the result of `work` to bytes that must be equal on all ranks.
            saving: Whether to wait for `save_timeout` rather than `rank_timeout`.

        Returns:
            What `work` returned on this rank.

        Raises:
            KeepBestError: On every rank, if any rank failed. It has the class that the lowest failing rank raised if
                that is one of this library. Otherwise it is a `RankFailedError` (a `StorageError` where the file system
                refused).
            RankTimeoutError: If a rank does not arrive in time.
            DesyncError: If ranks are in different steps or hold a different `state`.
            PoisonedError: If an earlier failure left the ranks in different places.
        """

        def work_and_state() -> tuple[T, bytes]:
            return (result := work()), state(result)

        outcome, failure = self._attempt(work_and_state)
        held = b"" if outcome is None else outcome[1]
        self.exchange(step, Number(None, None), failure=failure, remedy=remedy, state=held, saving=saving)
        return outcome[0]  # type: ignore[index]  # exchange raised if there is no outcome

    def broadcast(self, step: str, work: Callable[[], Any], *, remedy: str | None = None, saving: bool = False) -> Any:
        """Do `work` on rank 0, and return its JSON value on every rank. **Collective**. Raises what `agree` raises."""
        mine = work if self.is_main else lambda: None
        return self.gather_json(step, mine, remedy=remedy, saving=saving)[0]

    def gather_json(
        self, step: str, work: Callable[[], Any], *, remedy: str | None = None, saving: bool = False
    ) -> list[Any]:
        """Do `work` on every rank, and return all their JSON values, by rank. **Collective**. Raises as `agree`."""
        text, failure = self._attempt(lambda: json.dumps(work()))
        frames = self._meet(step, Number(None, None), failure=failure, remedy=remedy, text=text or "", saving=saving)
        return [json.loads(text) for text in self._texts(text or "", frames, saving=saving)]

    def exchange(
        self,
        step: str,
        number: Number,
        *,
        failure: BaseException | None = None,
        remedy: str | None = None,
        state: bytes = b"",
        saving: bool = False,
    ) -> list[Number]:
        """Return the numbers of all ranks. **Collective**: one exchange of 48 bytes where no rank failed or has a note.

        Args:
            step: Description of the work, in words. The same on every rank.
            number: Number that this rank holds.
            failure: Earlier failure of this rank, which every rank raises.
            remedy: What the user can do if the file system refuses. `None` where no file of the run is used, so that an
                `OSError` is one of the code of the user.
            state: Bytes that must be equal on all ranks.
            saving: Whether to wait for `save_timeout` rather than `rank_timeout`.

        Returns:
            The numbers by rank. They have the same float64 bits on every rank.

        Raises:
            KeepBestError: On every rank, if any rank has a `failure`. Its class is chosen as in `agree`.
            RankTimeoutError: If a rank does not arrive in time. Names those that did not, as far as can be known.
            DesyncError: If ranks are in different steps or hold a different `state`.
            PoisonedError: If an earlier failure left the ranks in different places.
        """
        note = number.note
        frames = self._meet(step, number, failure=failure, remedy=remedy, state=state, text=note, saving=saving)
        notes = self._texts(note, frames, saving=saving)
        return [Number(frame.value, frame.weight, note) for frame, note in zip(frames, notes, strict=True)]

    def compare(
        self, step: str, work: Callable[[], tuple[T, Number]], *, remedy: str | None = None, saving: bool = False
    ) -> tuple[T, list[Number]]:
        """Do `work` here, and return its result and the numbers of all ranks. **Collective**. Raises as `agree`.

        One exchange of 48 bytes where no rank failed or has a note.

        Args:
            step: Description of the work, in words. The same on every rank.
            work: Function that is rank-local and runs no collective. It returns a result and the number of this rank.
            remedy: What the user can do if the file system refuses. `None` where no file of the run is used, so that an
                `OSError` is one of the code of the user.
            saving: Whether to wait for `save_timeout` rather than `rank_timeout`.
        """
        outcome, failure = self._attempt(work)
        mine = Number(None, None) if outcome is None else outcome[1]
        numbers = self.exchange(step, mine, failure=failure, remedy=remedy, saving=saving)
        return outcome[0], numbers  # type: ignore[index]  # exchange raised if there is no outcome

    def flag(self) -> SharedFlag:
        """Return a new flag that is not raised. **Rank-local**. Every rank makes one and polls it equally often."""
        return SharedFlag(self._control, self._save_timeout)

    def mailbox(self) -> Mailbox:
        """Return the mailbox of these ranks, in which notes are waited for nearly for `save_timeout`. **Rank-local**.

        Every rank asks for it, or none.
        """
        if self._mailbox is None:
            control, patience = self._control, _PATIENCE_FOR_NOTES * self._save_timeout
            store = control.new_store("mailbox")
            self._mailbox = Mailbox(
                store,
                patience.total_seconds(),
                is_lost=lambda: control.poison is not None,
                is_gone=control.has_lost,
            )
        return self._mailbox

    def leave(self) -> None:
        """Let threads that still wait for notes do so for `rank_timeout` at most. **Rank-local**."""
        if self._mailbox is not None:
            self._mailbox.hurry(self._rank_timeout.total_seconds())
            self._mailbox = None

    @property
    def is_poisoned(self) -> bool:
        """Whether no collective may run any more. **Rank-local**."""
        return self._control.poison is not None

    def poison(self, reason: str) -> None:
        """Refuse all further collectives: this rank left the others in the middle of one. **Rank-local**."""
        self._control.poison = self._control.poison or reason

    def lose(self, step: str, error: BaseException) -> NoReturn:
        """Raise for an `error` that may have left the others in the middle of a collective. **Rank-local**.

        No collective may run any more.

        Raises:
            RankFailedError: Names this rank and the step. If `error` is one of this library or an interruption, it is
                raised itself.
        """
        error = cause_of(error)
        reason = f"failed to {step}: {type(error).__name__}: {text_of(error)}"
        if self.world_size > 1:
            self.poison(reason)
        if isinstance(error, KeepBestError) or not isinstance(error, Exception):
            raise error
        raise RankFailedError(f"rank {self.rank} of {self.world_size} {reason}") from error

    def _attempt(self, work: Callable[[], T]) -> tuple[T | None, BaseException | None]:
        # Not even an interruption of this rank may leave the others waiting: it is reported, then raised again.
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
        remedy: str | None,
        state: bytes = b"",
        text: str = "",
        saving: bool,
    ) -> list[Frame]:
        text = text if failure is None else FailureReport.of(step, failure, remedy).to_text()
        place = digest_place(step, state)
        mine = Frame(place, failure is not None, len(text.encode()), number.value, number.weight)
        sent = mine.pack()
        try:
            gathered = self._all_gather(sent, step, saving=saving)
        except RanksError as error:
            if failure is None:
                raise
            raise error from failure  # which says more: the collective that went wrong may have been one of the work
        # In a quiet interval all ranks often hold the same.
        frames = [mine if raw == sent else Frame.unpack(raw) for raw in gathered]
        places = [frame.place for frame in frames]
        if FLAG_PLACE in places:  # of a rank that will not come to exchange texts
            raise not_all_poll(self._control, frames, step) from failure
        # A failure explains why places differ, so it comes first.
        if True in [frame.failed for frame in frames]:
            self._raise_failures(failure, self._texts(text, frames, saving=saving), frames)
        if places.count(place) < len(places):
            self._raise_desync(step, state, saving)
        return frames

    def _texts(self, mine: str, frames: list[Frame], *, saving: bool) -> list[str]:
        longest = max([frame.text_bytes for frame in frames])
        if not longest:
            return [""] * self.world_size
        # Where a rank was interrupted before it, a text of this size would pass for its next frame.
        padded = mine.encode().ljust(longest + (longest == FRAME_BYTES), b"\0")
        texts = self._all_gather(padded, "exchange texts", saving=saving)
        return [text[: frame.text_bytes].decode() for text, frame in zip(texts, frames, strict=True)]

    def _raise_failures(self, mine: BaseException | None, texts: list[str], frames: list[Frame]) -> NoReturn:
        reports = {rank: FailureReport.from_text(texts[rank]) for rank, frame in enumerate(frames) if frame.failed}
        error = shared_error(mine, reports, self.world_size)
        if error is mine:
            raise error
        raise error from mine

    def _raise_desync(self, step: str, state: bytes, saving: bool) -> NoReturn:
        mine = f"{step}{SEPARATOR}{state.decode(errors='replace')}".encode(errors="replace")
        padded = mine[:_PLACE_WIDTH].ljust(_PLACE_WIDTH, b"\0")
        texts = [text.rstrip(b"\0").decode(errors="replace") for text in self._all_gather(padded, step, saving=saving)]
        self.poison("the ranks are not in the same step")
        raise DesyncError(
            f"{describe_difference(texts)}\n"
            "Call the keeper on every rank, in the same order, with the same settings and iterations."
        )

    def _all_gather(self, mine: bytes, step: str, *, saving: bool) -> list[bytes]:
        return self._control.all_gather(mine, step, self._save_timeout if saving else self._rank_timeout)

"""What is called on each new best, once it is on the disk: functions of the user, on rank 0 or on every rank."""

from __future__ import annotations

import inspect
import json
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from keepbest.decision import Best, Observation, Outcome
from keepbest.errors import ConfigError
from keepbest.iteration import TrainingIteration
from keepbest.ranks import Number, Ranks
from keepbest.run.folder import RunFolder
from keepbest.run.layout import snapshots_folder
from keepbest.saving.open_run import OpenRun
from keepbest.user_code import Log

_logger = Log(__name__)

Hook = Callable[[Outcome, Path], Any]
"""A function of the outcome of an observation and the folder of the snapshot that it made."""


class EveryRank:
    """Marks a hook on a new best that every rank calls, at the same moment, and not rank 0 alone.

    `BestKeeper(..., on_new_best=EveryRank(evaluate_on_test))`. It may run collectives, such as those of an evaluation.

    Args:
        hook: Function of the outcome and of the folder of the snapshot, as `on_new_best` takes it.
    """

    def __init__(self, hook: Hook) -> None:
        self._hook = hook

    def __call__(self, outcome: Outcome, path: Path) -> Any:
        return self._hook(outcome, path)


class NewBest(NamedTuple):
    """A new best that is committed.

    Attributes:
        iteration: Iteration whose weights these are.
        value: Value of the metric.
        enters_top: Whether it is among the best that are kept.
        snapshot: Name of the snapshot.
    """

    iteration: str
    value: float
    enters_top: bool
    snapshot: str

    @property
    def outcome(self) -> Outcome:
        """The outcome of its observation."""
        return Outcome(TrainingIteration.parse(self.iteration), self.value, True, enters_top=self.enters_top)


def check_hooks(hooks: object) -> tuple[Hook, ...]:
    """The hooks in what a user gives as `on_new_best`: a function, several, or `None`. **Rank-local**.

    Raises:
        ConfigError: If it is something else.
    """
    # A list of a config, such as that of Hydra, is a sequence of its own.
    is_several = isinstance(hooks, Sequence) and not isinstance(hooks, str) and not callable(hooks)
    given: list[Any] = [] if hooks is None else list(hooks) if is_several else [hooks]  # type: ignore[call-overload]
    for hook in given:
        if not callable(hook):
            raise ConfigError(
                f"on_new_best must be a function of an outcome and a path, or a list of functions, found {hook!r}"
            )
        called = hook._hook if isinstance(hook, EveryRank) else hook  # noqa: SLF001  # of this module
        if not callable(called):
            raise ConfigError(f"EveryRank must have a function of an outcome and a path, found {called!r}")
        _check_takes_both(called)
        if any(_does_nothing_yet(each) for each in (called, type(called).__call__)):
            raise ConfigError(
                f"on_new_best must be an ordinary function of an outcome and a path, found {called!r}, whose body does "
                "not run when it is called: it is async or a generator"
            )
    return tuple(given)


def _check_takes_both(hook: Callable[..., Any]) -> None:
    try:
        # Of what is called itself: a decorator may add or take arguments of the function inside of it.
        signature = inspect.signature(hook, follow_wrapped=False)
    except (TypeError, ValueError):  # of some functions written in C
        return
    try:
        signature.bind("outcome", "path")
    except TypeError as error:
        raise ConfigError(
            f"on_new_best must be a function of an outcome and a path, found {hook!r}, which cannot be called with "
            f"these two: {error}"
        ) from error


def _does_nothing_yet(function: object) -> bool:
    kinds = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    return any(is_of(function) for is_of in kinds)


def hooks_to_compare(hooks: Sequence[Hook]) -> str:
    """What must be equal on all ranks, in words. Functions themselves cannot be compared."""
    return f"on_new_best={['every rank' if isinstance(hook, EveryRank) else 'rank 0' for hook in hooks]}"


class NewBests:
    """The new bests of one keeper, from their commit to the calls of the hooks on them.

    A hook is called on the training thread, once for each new best and in their order, while its snapshot is there. If
    the process dies between the commit and the call, it is not called.

    Args:
        name: Name of the keeper.
        hooks: Functions to call; as many on each rank, and for the same ranks.
        run: Run folder that the keeper works in.
        ranks: Ranks of the keeper.
    """

    def __init__(self, name: str, hooks: Sequence[Hook], run: OpenRun, ranks: Ranks) -> None:
        self._name, self._hooks, self._run, self._ranks = name, hooks, run, ranks
        self._committed: deque[NewBest] = deque()  # on rank 0
        self._is_expected = self._is_calling = self._is_left = False  # on all ranks alike
        self._saves_are_over: threading.Event | None = None

    def expect(self) -> None:
        """A new best is on its way. **Rank-local**, on every rank alike."""
        self._is_expected, self._saves_are_over = bool(self._hooks), None

    def commit(self, observed: Observation, before: Best | None, enters_top: bool, snapshot: str) -> None:
        """Note that a new best is on the disk, and log it. **Rank-local**, on rank 0, from the thread that writes.

        Args:
            observed: Observation of it.
            before: Best before it; `None` if it is the first.
            enters_top: Whether it is among the best that are kept.
            snapshot: Name of its snapshot.
        """
        path = snapshots_folder(self._run.directory) / snapshot
        was = "the first" if before is None else f"before it {before}"
        if self._hooks and self._run.folder is not None:
            self._run.folder.hold(snapshot)
            self._committed.append(NewBest(str(observed.iteration), observed.value, enters_top, snapshot))
            # A keeper that is dropped, or open when the interpreter exits, does not come to `drop`.
            self._run.at_release(self._name, partial(_let_go_of, self._committed, self._name, self._run.folder))
        # Last, since a handler of the log may raise, and the best is kept.
        _logger.info("%s: new best %r at %s (%s): %s", self._name, observed.value, observed.iteration, was, path)

    def call_hooks(self) -> None:
        """Call the hooks on what is committed by now. **Collective**; it costs nothing where no new best is expected.

        A new best whose hook raises is not called again. Those after it are called at the next call.

        Raises:
            RankFailedError: On every rank, if a hook raises on one of them. It has the class of what was raised if that
                is one of this library.
        """
        if self._is_calling:  # a hook uses the keeper: what that brings comes after the hook
            return
        self._is_calling, is_under_way = True, False
        try:
            while self._is_expected and not is_under_way:
                is_under_way = self._call_on_committed()
        finally:
            self._is_calling = False

    def drop(self) -> None:
        """Call no hook any more: the run is about to be left as it is. **Rank-local**."""
        if not self._run.is_elsewhere:
            self._is_expected, self._is_left = False, True
            if self._run.folder is not None:
                # On the worker, after what is under way.
                let_go = partial(_let_go_of, self._committed, self._name, self._run.folder)
                self._run.worker.submit(let_go, lambda _: None)

    def _call_on_committed(self) -> bool:
        """Call the hooks on what is committed by now, and return whether more is under way. **Collective**."""
        step = f"look for new bests of {self._name} on the disk"
        is_under_way = not self._are_saves_over()  # before it is known what they have brought
        due = list(self._committed)
        mine = Number(float(is_under_way), None, json.dumps(due) if due else "")
        of_rank_0 = self._ranks.exchange(step, mine)[0]
        self._is_expected = of_rank_0.value != 0.0
        try:
            for each in json.loads(of_rank_0.note) if of_rank_0.note else ():
                if not self._is_left:  # a hook may have closed the keeper
                    self._call_on(NewBest(*each))
        except BaseException:
            self._is_expected = True  # those after it
            raise
        return of_rank_0.value != 0.0

    def _call_on(self, best: NewBest) -> None:
        iteration, path = best.iteration, snapshots_folder(self._run.directory) / best.snapshot
        hooks = self._hooks
        if self._ranks.is_main:
            self._committed.popleft()
        else:
            hooks = [hook for hook in hooks if isinstance(hook, EveryRank)]

        def call() -> None:
            for hook in hooks:
                hook(best.outcome, path)

        try:
            self._ranks.agree(f"call on_new_best of {self._name} at {iteration}", call, saving=True)
        finally:
            self._let_go(best.snapshot)

    def _are_saves_over(self) -> bool:
        """Whether nothing is on its way that was expected. The worker does everything in its order."""
        if not self._ranks.is_main:
            return True
        if self._saves_are_over is None:
            over = self._saves_are_over = threading.Event()
            self._run.worker.submit(over.set, lambda _: None)
        return self._saves_are_over.is_set()

    def _let_go(self, snapshot: str) -> None:
        if self._run.folder is not None:
            # On the worker, as all that changes the folder.
            folder = self._run.folder
            self._run.worker.submit(lambda: folder.let_go(snapshot), lambda _: None)


def _let_go_of(committed: deque[NewBest], name: str, folder: RunFolder) -> None:
    while committed:
        left = committed.popleft()
        _logger.warning(
            "%s: on_new_best was not called for %r at %s, since the run was left before",
            name,
            left.value,
            left.iteration,
        )
        folder.let_go(left.snapshot)

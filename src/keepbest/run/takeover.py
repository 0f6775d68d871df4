"""How a run is resumed: the state that a user brings back, and whether it fits the run. Pure."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from keepbest.decision import BestState, Policy
from keepbest.errors import ConfigError, RunExistsError
from keepbest.run.history import History


class Owner(NamedTuple):
    """The keeper that a state belongs to.

    Attributes:
        name: Name of the keeper.
        metric_key: Metric that it monitors.
        higher_is_better: Direction of the metric.
    """

    name: str
    metric_key: str
    higher_is_better: bool

    def __str__(self) -> str:
        direction = "higher" if self.higher_is_better else "lower"
        return f"{self.name!r} (metric {self.metric_key!r}, {direction} is better)"


@dataclass(frozen=True, slots=True)
class LoadedState:
    """A state that a user brings back, and where it is from.

    Attributes:
        keeper: Keeper that it belongs to.
        run_id: Id of its run; `None` if the keeper had not started.
        timeline: Number of its timeline among those of the keeper in the run.
        state: Bookkeeping of the timeline.
    """

    keeper: Owner
    run_id: str | None
    timeline: int | None
    state: BestState

    def __str__(self) -> str:
        return f"({self.keeper.name} of run {self.run_id}, timeline {self.timeline}: {self.state})"

    def to_json(self) -> dict[str, Any]:
        """JSON values only; `from_json` is the inverse."""
        state = {"run_id": self.run_id, "timeline": self.timeline, "state": self.state.to_json()}
        return {**self.keeper._asdict(), **state}

    @classmethod
    def from_json(cls, given: Any) -> LoadedState:
        """The inverse of `to_json`.

        Raises:
            ConfigError: If it is no such state.
        """
        try:
            keeper = Owner(*(given[name] for name in Owner._fields))
            return cls(keeper, given["run_id"], given["timeline"], BestState.from_json(given["state"]))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            found = f"with the keys {reprlib.repr(list(given))}" if isinstance(given, Mapping) else reprlib.repr(given)
            raise ConfigError(
                f"expected what state_dict() of a keeper returned, found a {type(given).__name__} {found}"
            ) from error

    def check_belongs_to(self, keeper: Owner) -> None:
        """Raise `ConfigError` unless this is a state of `keeper`."""
        if self.keeper != keeper:
            raise ConfigError(
                f"the state that was loaded is that of {self.keeper}, and this is {keeper}: load the state of the same "
                "keeper, or start a new run without one"
            )


class Existing(NamedTuple):
    """What happens to a run that is there and is not resumed, in the words of the face that a user came through.

    Attributes:
        sets_aside: Whether it is moved to a directory beside its own; else it is an error.
        resume: How it would be resumed.
        set_aside: How it would be set aside.
    """

    sets_aside: bool = False
    resume: str = "load_state_dict(), or resume='ledger'"
    set_aside: str = "existing='set_aside'"


OWN_LOOP = Existing()


def check_takeover(
    place: str | Path,
    history: History,
    *,
    keeper: str,
    policy: Policy,
    loaded: LoadedState | None,
    resumes: bool,
    existing: Existing,
) -> None:
    """Check that `keeper` can continue the run in `place`, which is a folder or the URL of a copy.

    Raises:
        ConfigError: If another keeper has this name, or the run kept the metric in the other direction.
        RunExistsError: If `keeper` does not resume, or resumes another run.
    """
    if not resumes:
        others = f"set it aside ({existing.set_aside}), or choose another directory"
        if not isinstance(place, Path):
            others = "or choose another remote"
        raise RunExistsError(f"{place} holds run {history.run_id}; resume it ({existing.resume}), {others}")
    twins = [name for name in history.keepers if name != keeper and name.casefold() == keeper.casefold()]
    if twins:
        raise ConfigError(f"{keeper!r} differs from {twins[0]!r} only in upper and lower case; give it another id")
    run_ids = {history.run_id, loaded.run_id if loaded is not None else None} - {None}
    if loaded is not None and len(run_ids) > 1:
        raise RunExistsError(
            f"{place} holds run {history.run_id}, but the state that was loaded is of run {loaded.run_id}; "
            "choose the directory of that run, or a new one"
        )
    past = history.keepers.get(keeper)
    if past is not None and past.policy.higher_is_better != policy.higher_is_better:
        direction = "higher" if past.policy.higher_is_better else "lower"
        raise ConfigError(f"{keeper}: this run was kept with '{direction} is better'; higher_is_better cannot change")


def describe_other_policy(before: Policy, now: Policy, known: BestState, state: BestState) -> str:
    """What follows where a keeper resumes with another `min_delta` or `baseline` than it had.

    Args:
        before: Policy by which it decided.
        now: Policy by which it decides.
        known: State at which it resumes, as `before` has it.
        state: The same as `now` has it.
    """
    changes = (
        f"{name} was {getattr(before, name)} and is {getattr(now, name)}"
        for name in ("min_delta", "baseline")
        if getattr(before, name) != getattr(now, name)
    )
    best = "the best to beat stays"
    if known.best != state.best:
        was, is_now = (each.best or "none yet" for each in (known, state))
        best = f"the best to beat was {was} and is {is_now}"
    return (
        f"{' and '.join(changes)}. All that was observed up to {state.last_iteration} is decided anew by that: {best}, "
        "and tolerances count anew. To continue as before, resume with what it was"
    )

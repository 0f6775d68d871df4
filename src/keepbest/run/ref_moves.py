"""Which refs move, and where to, because of an observation. Pure, except that it asks which snapshots are there."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from keepbest.decision import Best, BestState, Observation, Policy
from keepbest.iteration import TrainingIteration
from keepbest.run.events import Moves
from keepbest.run.history import History
from keepbest.run.names import tolerance_ref, top_ref
from keepbest.run.timeline import Timeline
from keepbest.user_code import Log

_logger = Log(__name__)

Holds = Callable[[str], bool]


class Kept(NamedTuple):
    """An observation whose weights are saved.

    Attributes:
        observation: Value and training iteration.
        is_new_best: Whether it is a new best of the timeline; else it is one of the `top_k` best only.
        exceeded: Tolerances that it closes, and the best that each keeps.
    """

    observation: Observation
    is_new_best: bool = True
    exceeded: Mapping[int, Best | None] = {}


def moves_of(kept: Kept, keeper: str, history: History, snapshot: str, holds: Holds) -> Moves:
    """The moves that follow from what is kept, in `snapshot`."""
    past, observation = history.keepers[keeper], kept.observation
    # After a resume from before the best, a worse model must not take its place.
    is_best_of_all = kept.is_new_best and past.policy.is_better(observation.value, past.kept_best, min_delta=0.0)
    moves: Moves = {keeper: snapshot} if is_best_of_all else {}
    moves |= tolerance_moves(keeper, past.present, kept.exceeded, holds)
    top = past.present.top(past.policy, Best(observation.value, observation.iteration), holds)
    places = _places(keeper, top, {**past.present.saved, observation.iteration: snapshot})
    return {**moves, **{name: target for name, target in places.items() if history.refs.get(name) != target}}


def tolerance_moves(keeper: str, branch: Timeline, bests: Mapping[int, Best | None], holds: Holds) -> Moves:
    """The moves of tolerances, each to the best that it keeps; a warning where that is gone."""
    moves: Moves = {}
    for tolerance, best in bests.items():
        snapshot = None if best is None else branch.saved.get(best.iteration)
        if snapshot is not None and holds(snapshot):
            moves[tolerance_ref(keeper, tolerance)] = snapshot
        elif best is not None:
            _logger.warning(
                "%s: tolerance=%d would have kept %s (%r), but its weights are no longer there",
                keeper,
                tolerance,
                best.iteration,
                best.value,
            )
    return moves


def resumed(
    keeper: str,
    history: History,
    policy: Policy,
    branch: Timeline,
    state: BestState,
    holds: Holds,
) -> Moves:
    """The moves that lead to `state`, one of `branch`: refs that have nothing to point at there are removed.

    Args:
        keeper: Name of the keeper.
        history: History of the run.
        policy: Policy by which the keeper decides from now on.
        branch: Timeline that it continues.
        state: State with all tolerances that the keeper has, or had before.
        holds: Function that says whether a snapshot is there.
    """
    before = history.keepers[keeper].policy
    tolerances = sorted({*before.tolerances, *policy.tolerances})
    top = {name: snapshot for name, snapshot in _places(keeper, state.top, branch.saved).items() if snapshot}
    wanted = {
        **tolerance_moves(keeper, branch, state.exceeded, holds),
        **{name: snapshot for name, snapshot in top.items() if holds(snapshot)},
    }
    names = [tolerance_ref(keeper, each) for each in tolerances]
    names += [top_ref(keeper, place) for place in range(1, max(before.top_k, policy.top_k) + 1)]
    return {name: wanted.get(name) for name in names if wanted.get(name) != history.refs.get(name)}


def rescued(keeper: str, history: History, best: str | None, holds: Holds) -> Moves:
    """The moves of a keeper's refs on snapshots that are gone: the one on the best moves to that of the timeline."""
    # Also those of tolerances that an earlier session had, which are in no policy any more.
    mine = re.compile(rf"{re.escape(keeper)}(\.(tolerance|top)=\d+)?")
    gone = {name for name, snapshot in history.refs.items() if mine.fullmatch(name) and not holds(snapshot)}
    return {name: best if name == keeper else None for name in gone}


def _places(keeper: str, top: Sequence[Best], saved: Mapping[TrainingIteration, str]) -> Moves:
    return {top_ref(keeper, place): saved.get(best.iteration) for place, best in enumerate(top, start=1)}

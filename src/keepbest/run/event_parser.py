"""From a line of a ledger, which anybody may have written, to its event. Pure.

Names are checked, since a name in a ledger becomes a path below the run folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from keepbest.decision import BestState, Policy
from keepbest.iteration import TrainingIteration
from keepbest.run.events import (
    CheckpointSaved,
    Event,
    KeeperBegan,
    KeeperEnded,
    Moves,
    Observed,
    Pinned,
    RefsMoved,
    Rewound,
    RunBegan,
    SessionBegan,
    Unpinned,
)
from keepbest.run.names import REF_PREFIX, RESUME_PREFIX, is_safe


def parse_event(line: Mapping[str, Any]) -> Event:
    """The event of a line; `event_to_json` is the inverse.

    Raises:
        ValueError, TypeError, LookupError, AttributeError, ArithmeticError: If it is no event, or one that names a file
            outside of the run folder.
    """
    kind = line["event"]
    if kind not in _PARSERS:
        raise ValueError(f"unknown event {kind!r}")
    return _PARSERS[kind](line)


def _parse_session(line: Mapping[str, Any]) -> SessionBegan:
    if type(line["restart"]) is not int:
        raise ValueError("restart must be an integer")
    return SessionBegan(line["restart"])


def _parse_begin(line: Mapping[str, Any]) -> KeeperBegan:
    return KeeperBegan(
        keeper=_keeper(line["keeper"]),
        metric_key=_text(line["metric_key"]),
        policy=_policy_from_json(line["policy"]),
        timeline=line["timeline"],
        at=None if line["at"] is None else TrainingIteration.parse(line["at"]),
        state=None if line["state"] is None else BestState.from_json(line["state"]),
        refs=_parse_moves(line),
        left=None if line.get("left") is None else tuple(_safe(name) for name in line["left"]),
    )


def _parse_observation(line: Mapping[str, Any]) -> Observed:
    snapshot = line.get("snapshot")
    return Observed(
        keeper=_keeper(line["keeper"]),
        iteration=TrainingIteration.parse(line["iteration"]),
        value=float(line["value"]),
        snapshot=None if snapshot is None else _safe(snapshot),
        manifest=None if snapshot is None else _text(line["manifest"]),
        is_best=line.get("best", True),
        superseded=line.get("superseded", False),
        lost=line.get("lost", False),
        refs=_parse_moves(line),
    )


def _parse_moves(line: Mapping[str, Any]) -> Moves:
    moves = line.get("refs", {}).items()
    return {_ref(name): None if snapshot is None else _safe(snapshot) for name, snapshot in moves}


def _parse_checkpoint(line: Mapping[str, Any]) -> CheckpointSaved:
    return CheckpointSaved(
        iteration=TrainingIteration.parse(line["iteration"]),
        snapshot=_safe(line["snapshot"]),
        manifest=_text(line["manifest"]),
        needs=tuple(_safe(name) for name in line["needs"]),
        refs=_parse_moves(line),
    )


def _keeper(name: str) -> str:
    if not name.startswith(REF_PREFIX):
        raise ValueError(f"{name!r} is no name of a keeper")
    return _safe(name)


def _ref(name: str) -> str:
    if not name.startswith((REF_PREFIX, RESUME_PREFIX)):
        raise ValueError(f"{name!r} is no name of a ref")
    return _safe(name)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {value!r}")
    return value


def _safe(name: str) -> str:
    if not is_safe(name):
        raise ValueError(f"{name!r} would lie outside of its folder")
    return name


def _policy_from_json(policy: Mapping[str, Any]) -> Policy:
    return Policy(**{**policy, "tolerances": tuple(policy["tolerances"])})


_PARSERS: dict[str, Callable[[Mapping[str, Any]], Event]] = {
    RunBegan.name: lambda line: RunBegan(_text(line["run"]), line["version"]),
    SessionBegan.name: _parse_session,
    KeeperBegan.name: _parse_begin,
    Observed.name: _parse_observation,
    RefsMoved.name: lambda line: RefsMoved(_keeper(line["keeper"]), _parse_moves(line)),
    Pinned.name: lambda line: Pinned(
        _keeper(line["keeper"]), _text(line["tag"]), tuple(_safe(name) for name in line["snapshots"])
    ),
    Unpinned.name: lambda line: Unpinned(_keeper(line["keeper"]), _text(line["tag"])),
    CheckpointSaved.name: _parse_checkpoint,
    Rewound.name: lambda line: Rewound(tuple(_ref(name) for name in line["abandoned"]), _parse_moves(line)),
    KeeperEnded.name: lambda line: KeeperEnded(_keeper(line["keeper"]), _parse_moves(line)),
}

"""The events of a ledger: what each line records, and its JSON. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

from keepbest.decision import BestState, Observation, Policy
from keepbest.iteration import TrainingIteration

VERSION = 6
"""Of the ledger and the manifests; another version is refused."""

Json = dict[str, Any]
Moves = dict[str, str | None]
"""Name of a ref -> name of the snapshot that it points at from now on; `None` removes the ref."""

_NO_MOVES: Mapping[str, str | None] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class RunBegan:
    """The first line: the id of the run, and the version of the format."""

    run: str
    version: int = VERSION

    name: ClassVar[str] = "run"
    is_waited_for: ClassVar[bool] = True
    refs: ClassVar[Mapping[str, str | None]] = _NO_MOVES

    def to_json(self) -> Json:
        return {"version": self.version, "run": self.run}


@dataclass(frozen=True, slots=True)
class SessionBegan:
    """A process resumed the run. `restart` counts these events from 1."""

    restart: int

    name: ClassVar[str] = "session"
    is_waited_for: ClassVar[bool] = False
    refs: ClassVar[Mapping[str, str | None]] = _NO_MOVES

    def to_json(self) -> Json:
        return {"restart": self.restart}


@dataclass(frozen=True, slots=True)
class KeeperBegan:
    """A keeper starts a new timeline: after `at` of an earlier one, or from a `state` that it was given.

    Attributes:
        keeper: Name of the keeper, which is that of its ref on the best.
        metric_key: Metric that it monitors.
        policy: Policy by which it decides.
        timeline: Number of the timeline that it continues; `None` where there is none.
        at: Iteration up to which it continues that timeline; `None` is its start.
        state: State that it starts from where the ledger does not know it.
        refs: Moves that lead to that state.
        left: Names of the snapshots that were there, where that of a best of the state was not; else `None`. A best
            without a snapshot is not one to beat.
    """

    keeper: str
    metric_key: str
    policy: Policy
    timeline: int | None
    at: TrainingIteration | None
    state: BestState | None
    refs: Moves = field(default_factory=dict)
    left: tuple[str, ...] | None = None

    name: ClassVar[str] = "begin"
    is_waited_for: ClassVar[bool] = True

    def to_json(self) -> Json:
        return {
            "keeper": self.keeper,
            "metric_key": self.metric_key,
            "policy": _policy_to_json(self.policy),
            "timeline": self.timeline,
            "at": None if self.at is None else str(self.at),
            "state": None if self.state is None else self.state.to_json(),
            "refs": self.refs,
            **({} if self.left is None else {"left": list(self.left)}),
        }


@dataclass(frozen=True, slots=True)
class Observed:
    """A keeper saw a value.

    Attributes:
        keeper: Name of the keeper.
        iteration: Training iteration of the value.
        value: Agreed value; NaN and infinities are written as text.
        snapshot: Name of the snapshot that holds the weights, if they were saved.
        manifest: Digest of the manifest of that snapshot.
        is_best: Whether a saved value was a new best of the timeline; else it is one of the top k only.
        superseded: Whether it was a new best whose weights were skipped, since a better one followed. It counts once
            that one is committed.
        lost: Whether it was a new best whose weights could not be written.
        refs: Moves that follow.
    """

    keeper: str
    iteration: TrainingIteration
    value: float
    snapshot: str | None = None
    manifest: str | None = None
    is_best: bool = True
    superseded: bool = False
    lost: bool = False
    refs: Moves = field(default_factory=dict)

    name: ClassVar[str] = "observation"

    @property
    def is_waited_for(self) -> bool:
        """Whether nothing is written after this line before it is on the disk."""
        return self.snapshot is not None or bool(self.refs)

    @property
    def is_plain(self) -> bool:
        """Whether it records a number, and nothing follows from it."""
        return not (self.is_waited_for or self.superseded or self.lost) and math.isfinite(self.value)

    @property
    def observation(self) -> Observation:
        """The observation as the bookkeeping counts it: what has no weights on the disk was no best."""
        return Observation(self.iteration, self.value, durable=self.snapshot is not None)

    def to_json(self) -> Json:
        line: Json = {
            "keeper": self.keeper,
            "iteration": str(self.iteration),
            "value": self.value if math.isfinite(self.value) else str(self.value),
        }
        if self.snapshot is not None:
            line |= {"snapshot": self.snapshot, "manifest": self.manifest, "best": self.is_best}
        if self.superseded:
            line["superseded"] = True
        if self.lost:
            line["lost"] = True
        if self.refs:
            line["refs"] = self.refs
        return line


@dataclass(frozen=True, slots=True)
class RefsMoved:
    """Refs of a keeper move without an observation: tolerances that closed earlier than was known.

    It is recorded after a loss, also without refs: bests that were skipped for one that was lost do not count.
    """

    keeper: str
    refs: Moves

    name: ClassVar[str] = "refs"
    is_waited_for: ClassVar[bool] = True

    def to_json(self) -> Json:
        return {"keeper": self.keeper, "refs": self.refs}


@dataclass(frozen=True, slots=True)
class Pinned:
    """Snapshots stay until the tag is pinned again or released."""

    keeper: str
    tag: str
    snapshots: tuple[str, ...]

    name: ClassVar[str] = "pin"
    is_waited_for: ClassVar[bool] = True
    refs: ClassVar[Mapping[str, str | None]] = _NO_MOVES

    def to_json(self) -> Json:
        return {"keeper": self.keeper, "tag": self.tag, "snapshots": list(self.snapshots)}


@dataclass(frozen=True, slots=True)
class Unpinned:
    """A tag is released."""

    keeper: str
    tag: str

    name: ClassVar[str] = "unpin"
    is_waited_for: ClassVar[bool] = True
    refs: ClassVar[Mapping[str, str | None]] = _NO_MOVES

    def to_json(self) -> Json:
        return {"keeper": self.keeper, "tag": self.tag}


@dataclass(frozen=True, slots=True)
class KeeperEnded(RefsMoved):
    """Training is over for a keeper; tolerances that were not exceeded get provisional refs."""

    name: ClassVar[str] = "end"


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """A resume checkpoint is complete.

    Attributes:
        iteration: Training iteration after which training continues from it.
        snapshot: Name of the snapshot that holds it.
        manifest: Digest of the manifest of that snapshot.
        needs: Snapshots that the states of keepers name at that iteration. They stay as long as a ref names this one.
        refs: Moves that follow: of the refs on this checkpoint, and on those that it replaces.
    """

    iteration: TrainingIteration
    snapshot: str
    manifest: str
    needs: tuple[str, ...]
    refs: Moves

    name: ClassVar[str] = "checkpoint"
    is_waited_for: ClassVar[bool] = True

    def to_json(self) -> Json:
        return {
            "iteration": str(self.iteration),
            "snapshot": self.snapshot,
            "manifest": self.manifest,
            "needs": list(self.needs),
            "refs": self.refs,
        }


@dataclass(frozen=True, slots=True)
class Rewound:
    """Training continues from something else than the newest resume checkpoint.

    Attributes:
        abandoned: Refs on resume checkpoints of the timeline that was left. The next one that is saved removes them.
        refs: Moves: of the ref on what training continues from, and of those on snapshots that are gone.
    """

    abandoned: tuple[str, ...]
    refs: Moves

    name: ClassVar[str] = "rewind"
    is_waited_for: ClassVar[bool] = True

    def to_json(self) -> Json:
        return {"abandoned": list(self.abandoned), "refs": self.refs}


Event = (
    RunBegan
    | SessionBegan
    | KeeperBegan
    | Observed
    | RefsMoved
    | Pinned
    | Unpinned
    | KeeperEnded
    | CheckpointSaved
    | Rewound
)


def event_to_json(event: Event) -> Json:
    """The line of an event, as JSON values; `parse_event` of `event_parser` is the inverse."""
    return {"event": event.name, **event.to_json()}


def _policy_to_json(policy: Policy) -> Json:
    return {
        "higher_is_better": policy.higher_is_better,
        "min_delta": policy.min_delta,
        "tolerances": list(policy.tolerances),
        "top_k": policy.top_k,
        "baseline": policy.baseline,
    }

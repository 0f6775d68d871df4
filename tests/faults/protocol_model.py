"""What short histories of the protocol add up to, by the rules alone: nothing of keepbest but the names of refs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from keepbest.run.names import best_ref, tolerance_ref

BEST, TOLERANCE = best_ref("loss"), 1
FATES = {"quiet": "quiet", "skip": "skipped", "lose": "lost"}
ACTIONS = ("best", "quiet", "skip", "lose", "pin", "unpin", "end", "restart")
AFTER_A_SKIP = ("best", "quiet", "lose", "restart")  # the rest waits until nothing is queued any more


@dataclass(frozen=True)
class Seen:
    """An observation: its value, the epoch whose weights reached it, and what became of them."""

    value: float
    epoch: int
    fate: str  # saved, quiet, skipped, counts (skipped, and a better one was committed), lost


@dataclass(frozen=True)
class Model:
    """What a history adds up to, by the rules alone."""

    seen: tuple[Seen, ...] = ()
    pins: frozenset[int] = frozenset()
    provisional: int | None = None  # the epoch that a ref keeps since training ended

    def steps(self) -> list[tuple[Seen | None, int]]:
        """The best and the drought after each observation."""
        best, drought, steps = None, 0, []
        for each in self.seen:
            counts = each.fate in ("saved", "counts") and (best is None or each.value < best.value)
            best, drought = (each, 0) if counts else (best, drought + 1)
            steps.append((best, drought))
        return steps

    def best(self) -> Seen | None:
        return self.steps()[-1][0] if self.seen else None

    def exceeded(self) -> list[Seen | None]:
        """The best that the tolerance keeps; empty while it is open."""
        return [best for best, drought in self.steps() if drought > TOLERANCE][:1]

    def after(self, action: str, epoch: int) -> Model:
        best = self.best()
        if action == "pin":
            named = [best, *self.exceeded()]
            return replace(self, pins=frozenset(each.epoch for each in named if each and each.fate == "saved"))
        if action == "unpin":
            return replace(self, pins=frozenset())
        if action == "end":
            return replace(self, provisional=None if self.exceeded() or best is None else best.epoch)
        if action == "restart":
            return replace(self.with_skipped("lost"), provisional=None)
        value = 100.0 if action == "quiet" else -float(epoch)
        if action in ("best", "quiet") and (best is None or value < best.value):
            model, fate = self.with_skipped("counts"), "saved"
        else:
            model, fate = (self.with_skipped("lost") if action == "lose" else self), FATES[action]
        return replace(model, seen=(*model.seen, Seen(value, epoch, fate)))

    def with_skipped(self, fate: str) -> Model:
        seen = tuple(replace(each, fate=fate) if each.fate == "skipped" else each for each in self.seen)
        return replace(self, seen=seen)

    def refs(self) -> dict[str, int]:
        """The epoch that each ref keeps."""
        saved = [each.epoch for each in self.seen if each.fate == "saved"]
        kept = [each.epoch for each in self.exceeded() if each is not None] or [self.provisional]
        refs = {BEST: max(saved, default=None), tolerance_ref(BEST, TOLERANCE): kept[0]}
        return {ref: epoch for ref, epoch in refs.items() if epoch is not None}

    def summary(self) -> tuple[object, ...]:
        """What can be seen of it after a resume."""
        model = self.after("restart", 0)
        best = model.best()
        kept = [None if each is None else each.epoch for each in model.exceeded()]
        drought = model.steps()[-1][1] if model.seen else 0
        last = model.seen[-1].epoch if model.seen else None
        return None if best is None else best.epoch, drought, kept, last, model.refs()


def histories(length: int) -> Iterator[tuple[str, ...]]:
    """All histories of so many actions that a keeper can bring about."""
    for actions in itertools.product(ACTIONS, repeat=length):
        if all(_may_follow(actions[:place], action) for place, action in enumerate(actions)):
            yield actions


def _may_follow(before: tuple[str, ...], action: str) -> bool:
    since = list(itertools.takewhile(lambda each: each in ("skip", "quiet"), reversed(before)))
    if "skip" in since:  # a second interval without a better one would need what was skipped
        return action in AFTER_A_SKIP and not (action == "quiet" and "quiet" in since)
    # What is skipped was a better one, of which there is another already.
    return action != "skip" or "best" in before


def models_of(actions: tuple[str, ...]) -> list[Model]:
    models, epoch = [Model()], 0
    for action in actions:
        epoch += action in ("best", "quiet", "skip", "lose")
        models.append(models[-1].after(action, epoch))
    return models


def last_durable(actions: tuple[str, ...]) -> int:
    """The number of actions after which everything was synced."""
    waited = [
        number for number, action in enumerate(actions, 1) if action in ("best", "pin", "unpin", "end", "restart")
    ]
    return waited[-1] if waited else 0

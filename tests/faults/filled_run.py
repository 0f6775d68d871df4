"""Runs that observe the same values, with each iteration's weights filled with its number.

What a ref must hold is then known without asking the store.
"""

from __future__ import annotations

import math
from pathlib import Path

from torch import nn

from keepbest import BestKeeper, TrainingIteration, load
from keepbest.decision import BestState, Observation, Policy, fold
from keepbest.run.reader import read_history
from keepbest.run.verify import verify

BEST = "best_model.loss"
# New bests at 1, 2, 5 and 8; tolerance 1 is exceeded at 4 and keeps 2, tolerance 5 never.
VALUES = [5.0, 4.0, 4.5, 4.4, 3.0, 3.5, -math.inf, 2.0, 2.5]
TOLERANCES = (1, 5)
POLICY = Policy(higher_is_better=False, tolerances=TOLERANCES)


def observations() -> list[Observation]:
    return [Observation(TrainingIteration(epoch=number), value) for number, value in enumerate(VALUES, start=1)]


COMPLETE = fold(POLICY, observations())


def net(width: int = 4) -> nn.Module:
    return nn.Linear(width, 4, bias=False)


def keeper_of(directory: Path, model: nn.Module, **settings) -> BestKeeper:
    return BestKeeper(
        model, directory=directory, metric_key="loss", higher_is_better=False, tolerances=TOLERANCES, **settings
    )


def go_on(keeper: BestKeeper, model: nn.Module, values=VALUES) -> list[Observation]:
    """Observes what the keeper has not seen yet, and returns what became of it."""
    last = keeper.state.last_iteration
    seen = []
    for epoch in range(1 if last is None else last.epoch + 1, len(values) + 1):
        nn.init.constant_(model.weight, float(epoch))
        outcome = keeper.observe(values[epoch - 1], TrainingIteration(epoch=epoch))
        seen.append(Observation(outcome.iteration, outcome.value, durable=not outcome.save_failed))
    return seen


def refs_hold(directory: Path, width: int = 4) -> dict[str, int]:
    """For each ref the number of the iteration whose weights it holds."""
    held = {}
    for ref in read_history(directory).refs:
        model = net(width)
        load(directory, ref, model)
        (number,) = set(model.weight.flatten().tolist())
        held[ref] = int(number)
    return held


def refs_of(state: BestState) -> dict[str, int]:
    """What the refs of a finished run with this state must hold, said without the store."""
    bests = {BEST: state.best, **{f"{BEST}.tolerance={t}": state.exceeded.get(t, state.best) for t in TOLERANCES}}
    return {ref: best.iteration.epoch for ref, best in bests.items() if best is not None}


def recorded_state(directory: Path) -> BestState:
    """What a resume finds in the ledger. It takes the provisional refs back."""
    keeper = keeper_of(directory, net(), resume="ledger")
    keeper.start()
    keeper.abandon()
    return keeper.state


def damage(directory: Path) -> list[str]:
    ledger = directory / "checkpoints/ledger.jsonl"
    if not ledger.exists() or b"\n" not in ledger.read_bytes():
        return []  # the first line was refused
    return [fault.message for fault in verify(directory) if fault.kind == "damage"]

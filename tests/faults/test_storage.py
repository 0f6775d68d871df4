"""A disk that is full, read-only or broken: every rank learns it at once, nothing that was kept is lost, and it goes on.

The runs observe the same values, and each iteration's weights are filled with its number, so that what a ref must hold
is known without asking the store.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from keepbest import BestKeeper, TrainingIteration, load
from keepbest.decision import Observation, Policy, fold
from keepbest.errors import SnapshotError, StorageError
from keepbest.store.read import read_history
from keepbest.store.verify import verify
from tests.faults.broken_files import OPERATIONS, Fault, install

BEST = "best_model.loss"
# New bests at 1, 2, 5 and 8; tolerance 1 is exceeded at 4 and keeps 2, tolerance 5 never.
VALUES = [5.0, 4.0, 4.5, 4.4, 3.0, 3.5, math.nan, 2.0, 2.5]
TOLERANCES = (1, 5)
POLICY = Policy(higher_is_better=False, tolerances=TOLERANCES)


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


def weights_of(directory: Path, ref: str, width: int = 4) -> int:
    """The number of the iteration that `ref` holds the weights of."""
    model = net(width)
    load(directory, ref, model)
    (number,) = set(model.weight.flatten().tolist())
    return int(number)


def kept(directory: Path) -> dict[str, int]:
    return {ref: weights_of(directory, ref) for ref in read_history(directory).refs}


def expected_refs(state) -> dict[str, int]:
    """What the refs of a finished run with this state must hold, said without the store."""
    bests = {BEST: state.best, **{f"{BEST}.tolerance={t}": state.exceeded.get(t, state.best) for t in TOLERANCES}}
    return {ref: best.iteration.epoch for ref, best in bests.items() if best is not None}


def damage(directory: Path) -> list[str]:
    return [fault.message for fault in verify(directory) if fault.kind == "damage"]


# --- each operation of the file layer, at each of its calls -----------------------------------------------------------


def count_calls(directory: Path) -> dict[str, int]:
    with pytest.MonkeyPatch.context() as patch:
        install(patch, counter := Fault())
        run_with_faults(directory, "raise")
    return counter.calls


def run_with_faults(directory: Path, on_save_error: str) -> tuple[list[Observation], BaseException | None]:
    """One session of the run; ends where the storage fails."""
    seen: list[Observation] = []
    model = net()
    keeper = keeper_of(directory, model, on_save_error=on_save_error, resume="ledger")
    try:
        with keeper:
            for upto in range(1, len(VALUES) + 1):
                seen += go_on(keeper, model, VALUES[:upto])
                if upto == 6:
                    keeper.flush(pin="resume")
    except StorageError as error:
        return seen, error
    return seen, None


@pytest.mark.parametrize("on_save_error", ["raise", "warn"])
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_run_recovers_from_a_refusal_of_any_call(operation, lasting, on_save_error, tmp_path):
    calls = count_calls(tmp_path / "whole")[operation]
    complete = fold(POLICY, [Observation(TrainingIteration(epoch=n), v) for n, v in enumerate(VALUES, start=1)])
    assert calls > 0
    for number in range(1, calls + 1):
        directory = tmp_path / str(number)
        with pytest.MonkeyPatch.context() as patch:
            install(patch, fault := Fault(operation, number, 10**9 if lasting else number))
            seen, error = run_with_faults(directory, on_save_error)
            assert fault.refused
            where = f"{operation} number {number}, of a run that ended with {error!r}"
            if error is not None:
                assert "Input/output error" in str(error), where
            assert faults_now(directory) == [], where
            fault.mend()
            again, error = run_with_faults(directory, on_save_error)
        assert error is None, where
        assert verify(directory) == [], where
        history = read_history(directory)
        lost = {entry.iteration for entry in seen if not entry.durable}
        observed = [replace(entry, durable=entry.iteration not in lost) for entry in whole_timeline()]
        state = fold(POLICY, observed)
        assert on_save_error == "warn" or state == complete
        assert history.keepers[BEST].state(POLICY, until=TrainingIteration(epoch=len(VALUES))) == state, where
        assert kept(directory) == expected_refs(state), where


def whole_timeline() -> list[Observation]:
    return [Observation(TrainingIteration(epoch=number), value) for number, value in enumerate(VALUES, start=1)]


def faults_now(directory: Path) -> list[str]:
    try:
        return damage(directory)
    except SnapshotError:  # the first line was never written
        return []

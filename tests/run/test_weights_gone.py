"""A best without weights is not one to beat."""

from __future__ import annotations

import logging
import math
import shutil

import pytest

from keepbest import load
from keepbest.decision import Best
from keepbest.run.verify import verify
from tests.kit.runs import Run, refs, saved_at, snapshots, update

BEST = "best_model.loss"


def removed(folder, **settings):
    """The folder of the best was removed between two starts."""
    shutil.rmtree(folder / "checkpoints/snapshots/U3")
    run = Run(folder, resume="ledger", **settings)
    run.keeper.start()
    return run


def before(folder, **settings):
    """The run is resumed at an iteration whose best was replaced since."""
    run = Run(folder, **settings)
    run.keeper.start(at=update(1))
    return run


def harder(folder, **settings):
    """With a greater threshold an earlier value is the best, whose weights were replaced."""
    run = Run(folder, resume="ledger", min_delta=0.5, **settings)
    run.keeper.start()
    return run


@pytest.mark.parametrize("has_copy", [False, True])
@pytest.mark.parametrize("resume", [removed, before, harder])
def test_finite_value_replaces_a_best_without_weights(resume, has_copy, tmp_path, caplog):
    folder = tmp_path / "run"
    settings = {"remote": f"file://{tmp_path}/copy"} if has_copy else {}
    first = Run(folder, **settings)
    with first.keeper:
        first.observe(1.0, 0.95, 0.9)
    if resume is removed and has_copy:
        shutil.rmtree(tmp_path / "copy/checkpoints/snapshots/U3")
    run = resume(folder, **settings)
    assert "the next finite value is a new best" in caplog.text
    assert run.keeper.state.best is None
    run.keeper.flush()  # what was begun to be fetched is removed in the background
    assert verify(folder) == []
    kept = snapshots(folder)
    assert not run.observe(math.nan, first=4)[0].is_new_best
    assert (snapshots(folder), verify(folder)) == (kept, [])
    [outcome] = run.observe(0.97, first=5)
    assert outcome.is_new_best
    assert run.keeper.state.best == Best(0.97, update(5))
    state = run.keeper.state
    run.keeper.close()
    assert verify(folder) == []
    # The best of all is still the better one, as far as there is one.
    assert saved_at(folder, BEST) == (5 if resume is removed else 3)
    if has_copy:
        assert load(f"file://{tmp_path}/copy", BEST, run.model).value == (0.97 if resume is removed else 0.9)
    again = Run(folder, resume="ledger", min_delta=run.keeper.policy.min_delta, **settings)
    with again.keeper:
        assert again.keeper.state == state


def test_best_that_the_copy_still_has_is_brought_back(tmp_path):
    settings = {"remote": f"file://{tmp_path}/copy"}
    first = Run(tmp_path / "run", **settings)
    with first.keeper:
        first.observe(1.0, 0.95, 0.9)
    run = removed(tmp_path / "run", **settings)
    assert run.keeper.state.best == Best(0.9, update(3))
    assert not run.observe(0.97, first=4)[0].is_new_best
    run.keeper.close()
    assert saved_at(tmp_path / "run", BEST) == 3


def test_state_resumed_in_an_empty_folder_keeps_the_next_value(tmp_path, caplog):
    first = Run(tmp_path / "a", tolerances=[0, 5], keep_top_k=2)
    with first.keeper:
        first.observe(1.0, 2.0, 3.0)
        state = first.keeper.state_dict()
    run = Run(tmp_path / "b", tolerances=[0, 5], keep_top_k=2)
    run.keeper.load_state_dict(state)
    with run.keeper as keeper:
        assert "the weights of the best, 1.0 at U1, are not in" in caplog.text
        assert (keeper.state.best, keeper.state.top, keeper.state.tolerance_counter) == (None, (), 2)
        assert keeper.state.exceeded == {0: Best(1.0, update(1))}
        assert [outcome.is_new_best for outcome in run.observe(9.0, 8.0, 8.5, first=4)] == [True, True, False]
        state = keeper.state
    assert (saved_at(tmp_path / "b", BEST), verify(tmp_path / "b")) == (5, [])
    with Run(tmp_path / "b", tolerances=[0, 5], keep_top_k=2, resume="ledger").keeper as resumed:
        assert resumed.state == state
    assert keeper.state_dict()["run_id"] == first.keeper.state_dict()["run_id"]


def test_nothing_else_is_removed_before_there_is_a_new_best(tmp_path):
    run = Run(tmp_path)
    with run.keeper:
        run.observe(5.0)
        run.keeper.flush(pin="p")
        run.observe(1.0, first=2)
    run = Run(tmp_path)
    run.keeper.start(at=update(1))
    run.observe(3.0, first=2)  # the best of this timeline; no ref names it
    run.keeper.release("p")
    assert snapshots(tmp_path) == {"U2", "U2.r1"}
    run.keeper.abandon()
    run = Run(tmp_path)
    run.keeper.start(at=update(1))
    run.observe(math.nan, first=2)
    run.keeper.flush()
    assert (run.keeper.state.best, snapshots(tmp_path)) == (None, {"U2", "U2.r1"})
    run.observe(4.0, first=3)
    assert (snapshots(tmp_path), refs(tmp_path)) == ({"U2", "U3.r2"}, {BEST: "U2"})
    run.keeper.close()


def test_ref_on_lost_weights_moves_to_the_best_that_is_left(tmp_path):
    run = Run(tmp_path, tolerances=[0])
    with run.keeper:
        run.observe(5.0)
        run.keeper.flush(pin="p")
        run.observe(1.0, 2.0, first=2)
    shutil.rmtree(tmp_path / "checkpoints/snapshots/U2")
    run = Run(tmp_path, tolerances=[0])
    run.keeper.start(at=update(1))
    assert (run.keeper.state.best, refs(tmp_path)) == (Best(5.0, update(1)), {BEST: "U1"})
    assert verify(tmp_path) == []
    run.observe(3.0, first=2)
    assert refs(tmp_path) == {BEST: "U2.r1"}
    run.keeper.close()


def test_places_of_weights_that_are_gone_are_free(tmp_path, caplog):
    run = Run(tmp_path, keep_top_k=3)
    with run.keeper:
        run.observe(1.0, 2.0, 3.0)
    shutil.rmtree(tmp_path / "checkpoints/snapshots/U2")
    run = Run(tmp_path, keep_top_k=3, resume="ledger")
    with run.keeper:
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert [text.partition(" are ")[0] for text in warnings] == [f"{BEST}: the weights of 2.0 at U2"]
        assert run.keeper.state.best == Best(1.0, update(1))
        assert [outcome.enters_top for outcome in run.observe(9.0, 8.0, 8.5, first=4)] == [True, True, False]
        state = run.keeper.state
    assert {ref: saved_at(tmp_path, ref) for ref in refs(tmp_path)} == {
        BEST: 1, f"{BEST}.top=1": 1, f"{BEST}.top=2": 3, f"{BEST}.top=3": 5,
    }  # fmt: skip
    assert verify(tmp_path) == []
    with Run(tmp_path, keep_top_k=3, resume="ledger").keeper as resumed:
        assert resumed.state == state

"""The Trainer's own best checkpoint and EarlyStoppingCallback are the oracle of what is kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from keepbest.errors import ConfigError, MissingMetricError, RunExistsError
from keepbest.integrations.transformers import BestCheckpoint
from tests.integrations.trainer_runs import (
    VALUES,
    abandon_all,
    kept,
    make_trainer,
    observed,
    run_in_pieces,
    weights_of,
    weights_of_checkpoint,
)
from tests.ranks.pool import run_ranks
from tests.store.runs import ledger, refs, snapshots

ALL = [(f"U{number}", value) for number, value in enumerate(VALUES, start=1)]


def run(directory, strategy, settings, arguments):
    """Trains to the end; the state of our keeper, the Trainer's best checkpoint, and the weights that it has loaded."""
    best = BestCheckpoint(tolerances=[0, 1, 2], keep_top_k=3, **settings)
    trainer = make_trainer(directory, callbacks=[best], strategy=strategy, load_best_model_at_end=True, **arguments)
    trainer.train()
    return best.keeper.state, trainer.state.best_model_checkpoint, weights_of(trainer.model.state_dict())


@pytest.mark.parametrize(
    ("strategy", "world_size", "settings"),
    [("alone", 1, {}), ("ddp", 2, {}), ("ddp", 2, {"async_save": True, "format": "safetensors"})],
)
def test_best_and_top_k_are_what_the_trainer_itself_wrote_at_these_steps(strategy, world_size, settings, tmp_path):
    results = run_ranks(run, world_size, tmp_path, strategy, settings, {}, init=world_size > 1)
    assert [state for state, *_ in results] == [results[0][0]] * world_size
    found, (_, path, loaded) = kept(tmp_path), results[0]
    assert found[""] == ("U6", 2.0, weights_of_checkpoint(path)) == ("U6", 2.0, loaded)
    for place, step in enumerate([6, 8, 2], start=1):
        of_trainer = weights_of_checkpoint(tmp_path / f"checkpoint-{step}")
        assert found[f".top={place}"] == (f"U{step}", VALUES[step - 1], of_trainer)
    assert len({str(weights) for *_, weights in found.values()}) == 3


@pytest.mark.parametrize(("strategy", "settings"), [("fsdp1", {}), ("fsdp2", {}), ("fsdp2", {"format": "dcp"})])
def test_best_of_sharded_models_is_what_the_trainer_loads_at_the_end(strategy, settings, tmp_path):
    results = run_ranks(run, 2, tmp_path, strategy, settings, {"save_steps": 2})
    assert [kept(tmp_path)[""]] * 2 == [("U6", 2.0, loaded) for *_, loaded in results]


def test_best_is_that_of_the_save_strategy_best(tmp_path):
    [(_, path, _), _] = run_ranks(run, 2, tmp_path, "ddp", {}, {"save_strategy": "best", "save_total_limit": 1})
    assert kept(tmp_path)[""] == ("U6", 2.0, weights_of_checkpoint(path))


def stop_early(directory):
    """What the Trainer ends with, in a run of its own for each patience."""
    found = {}
    for patience in (1, 2, 3, 4):
        stopper = EarlyStoppingCallback(early_stopping_patience=patience)
        trainer = make_trainer(directory / str(patience), callbacks=[stopper], load_best_model_at_end=True)
        trainer.train()
        found[patience] = trainer.state.global_step, trainer.state.best_metric, weights_of(trainer.model.state_dict())
    return found


def run_beside(directory):
    best = BestCheckpoint(tolerances=[0, 1, 2])
    stopper = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = make_trainer(directory, callbacks=[best, stopper], load_best_model_at_end=True)
    trainer.train()
    return trainer.state.global_step, weights_of(trainer.model.state_dict())


def run_tolerances(directory):
    best = BestCheckpoint(tolerances=[0, 1, 2, 3])
    make_trainer(directory / "run", callbacks=[best]).train()
    return stop_early(directory / "peer"), run_beside(directory / "beside")


def test_tolerance_keeps_what_early_stopping_with_one_more_of_patience_would_have_kept(tmp_path):
    stopped, (steps, weights) = run_ranks(run_tolerances, 2, tmp_path)[0]
    assert [step for step, *_ in stopped.values()] == [3, 4, 5, 8]  # the first three never saw the best of all
    found = kept(tmp_path / "run")
    for patience, (_, value, loaded) in stopped.items():
        iteration = "U2" if patience < 4 else "U6"
        assert found[f".tolerance={patience - 1}"] == (iteration, value, loaded)
    # Early stopping works beside it, and ends the run where the tolerance is exceeded.
    beside = kept(tmp_path / "beside")
    assert (steps, beside[""], beside[".tolerance=1"]) == (4, ("U2", 3.0, weights), found[".tolerance=1"])


def run_whole_and_in_pieces(directory, pieces, settings, arguments):
    whole = run_in_pieces(directory / "whole", [(VALUES, None)], settings, arguments)
    return whole, run_in_pieces(directory / "resumed", pieces, settings, arguments)


@pytest.mark.parametrize(
    ("pieces", "settings", "arguments"),
    [
        ([(VALUES[:3], None), (VALUES, None)], [{}], {"save_total_limit": 1}),
        ([(VALUES, 4), (VALUES, 8), (VALUES, None)], [{"async_save": True}], {"save_steps": 2}),
        ([(VALUES, 5), (VALUES, None)], [{}], {"save_strategy": "best", "eval_on_start": True}),
        ([(VALUES, 6), (VALUES, None)], [{}], {"restore_callback_states_from_checkpoint": True}),
        ([(VALUES, 6), (VALUES, None)], [{}, {"id": "b", "min_delta": 1.5}], {"save_steps": 2}),
        ([(VALUES, 5), (VALUES, None)], [{}], {"eval_steps": 2, "save_steps": 3, "eval_on_start": True}),
        ([(VALUES, 5), (VALUES, None)], [{}], {"gradient_accumulation_steps": 3}),
        ([(VALUES, 6), (VALUES, None)], [{}], {"strategy": "fsdp2", "save_steps": 2}),
    ],
)
def test_run_that_goes_on_from_a_checkpoint_ends_like_one_that_was_never_stopped(pieces, settings, arguments, tmp_path):
    results = run_ranks(run_whole_and_in_pieces, 2, tmp_path, pieces, settings, arguments)
    for whole, resumed in results:
        assert resumed == whole == results[0][0]
    assert kept(tmp_path / "resumed") == kept(tmp_path / "whole")
    assert observed(tmp_path / "resumed") == observed(tmp_path / "whole") != []
    assert len(refs(tmp_path / "whole")) == 7 * len(settings)

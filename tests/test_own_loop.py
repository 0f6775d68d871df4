"""What somebody may pass to a keeper, call, or forget, in a loop of their own."""

from __future__ import annotations

import itertools
import logging
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from keepbest import BestKeeper, TrainingIteration, load
from keepbest.errors import ConfigError, IterationError, KeepBestError, MissingMetricError
from keepbest.ranks import Ranks
from tests.kit.pool import run_ranks
from tests.kit.runs import Run, refs, saved_at, set_weights, snapshots, update
from tests.kit.strategies import fsdp2

BEST = "best_model.loss"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"epoch": 3}, TrainingIteration(epoch=3)),
        ({"update": np.int64(3)}, TrainingIteration(update=3)),
        ({"epoch": 1, "sample": 9}, TrainingIteration(epoch=1, sample=9)),
        ({"update": 2, "batch": 8}, TrainingIteration(update=2, batch=8)),
        ({"iteration": TrainingIteration(epoch=3)}, TrainingIteration(epoch=3)),
    ],
    ids=str,
)
def test_iteration_may_be_given_by_its_parts(given, expected, tmp_path):
    with Run(tmp_path).keeper as keeper:
        assert keeper.observe(1.0, **given).iteration == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"iteration": 3}, "got 3 of type int, .*write epoch="),
        ({"iteration": np.int64(3)}, "write epoch="),
        ({"iteration": "E3"}, "write epoch="),
        ({}, "Write epoch="),
        ({"iteration": TrainingIteration(epoch=3), "epoch": 3}, "either a TrainingIteration or epoch=, not both"),
        ({"epoch": 1.0}, "epoch must be an integer"),
    ],
    ids=str,
)
def test_what_is_no_iteration_is_refused_with_what_to_write(given, message, tmp_path):
    with Run(tmp_path).keeper as keeper:
        with pytest.raises(IterationError, match=message):
            keeper.observe(1.0, **given)
        assert refs(tmp_path) == {}
        keeper.observe(1.0, epoch=1)
    with pytest.raises(IterationError, match="write epoch="):
        Run(tmp_path).keeper.start(at=1)


def observe_with_one_rank_wrong(directory):
    wrong = Ranks.connect().rank == 1
    keeper = Run(directory, rank_timeout=20.0).keeper
    keeper.start()
    told = []
    for value, iteration in ((1.0, 3 if wrong else update(1)), ({"val": 1.0} if wrong else {"loss": 1.0}, update(1))):
        with pytest.raises(KeepBestError) as caught:
            keeper.observe(value, iteration)
        told.append((type(caught.value), str(caught.value)))
    assert keeper.observe({"loss": 1.0}, update(1)).is_new_best
    keeper.close()
    return told


def test_what_one_rank_passes_wrongly_is_refused_on_all(tmp_path):
    results = run_ranks(observe_with_one_rank_wrong, 2, tmp_path)
    assert results[0] == results[1]
    (iteration, first), (missing, second) = results[0]
    assert (iteration, missing) == (IterationError, MissingMetricError)
    assert "rank 1 of 2: IterationError: an iteration must be a TrainingIteration" in first
    assert "  rank 1: observe() received a mapping without 'loss'; it has: val" in second


def test_mapping_of_metrics_is_observed_by_its_key(tmp_path):
    with Run(tmp_path, metric_key="val/accuracy").keeper as keeper:
        assert keeper.observe({"loss": 1.0, "val/accuracy": np.array([0.5])}, epoch=1).value == 0.5


def test_model_must_be_a_module(tmp_path):
    with pytest.raises(ConfigError, match=r"must be a torch\.nn\.Module, got dict"):
        BestKeeper({"model": nn.Linear(1, 1)}, directory=tmp_path / "run", metric_key="loss")


@pytest.mark.parametrize("key", [None, 5, b"loss", ""])
def test_metric_key_must_be_a_name(key, tmp_path):
    with pytest.raises(ConfigError, match="metric_key must be the name of a metric, .* got " + re.escape(repr(key))):
        BestKeeper(nn.Linear(1, 1), directory=tmp_path, metric_key=key, higher_is_better=False)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, f"'{BEST}' (metric 'loss', lower is better) starts, direction taken from the name"),
        (
            {"metric_key": "score", "higher_is_better": True},
            "'best_model.score' (metric 'score', higher is better) starts, direction taken from higher_is_better",
        ),
    ],
)
def test_direction_is_logged_once_when_a_keeper_starts(settings, said, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="keepbest")
    with Run(tmp_path, **settings).keeper as keeper:
        keeper.observe(1.0, update(1))
        assert [record.getMessage() for record in caplog.records if record.name == "keepbest.keeper"] == [said]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([], "nothing was observed"),
        ([math.nan, math.inf], "no finite value was observed and saved up to U2"),
        ([math.nan, 1.0], None),
    ],
    ids=str,
)
def test_run_that_ends_with_nothing_kept_says_so(values, said, tmp_path, caplog):
    run = Run(tmp_path)
    with run.keeper:
        run.observe(*values)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == ([] if said is None else [warnings[0]])
    assert said is None or said in warnings[0]


@pytest.mark.parametrize("change", [{"id": "b"}, {"metric_key": "accuracy"}, {"higher_is_better": True}], ids=str)
def test_state_of_another_keeper_is_refused(change, tmp_path):
    run = Run(tmp_path / "a")
    with run.keeper:
        run.observe(1.0)
        state = run.keeper.state_dict()
    other = Run(tmp_path / "b", **change).keeper
    with pytest.raises(
        ConfigError, match=r"is that of 'best_model\.loss' \(metric 'loss', lower is better\), and this"
    ):
        other.load_state_dict(state)
    with other:  # it is as if nothing had been loaded
        assert other.observe(5.0, update(1)).is_new_best


def in_inference_mode(directory, settings, is_sharded):
    """All orders of inside and outside, each with new bests and quiet intervals, and the calls between them."""
    wrong = []
    for number, inside in enumerate(itertools.product([False, True], repeat=4)):
        model = nn.Linear(4, 4)
        run = Run(directory / str(number), fsdp2(model) if is_sharded else model, rank_timeout=20.0, **settings)
        steps = [
            lambda run=run: run.observe(3.0, 4.0),
            lambda run=run: run.observe(2.0, 5.0, first=3),
            lambda run=run: run.keeper.restore_best(),
            lambda run=run: [*run.observe(1.0, 0.5, 0.25, 6.0, first=5), run.keeper.close()],
        ]
        for step, is_inside in zip(steps, inside, strict=True):
            with torch.inference_mode(mode=is_inside):
                step()
        set_weights(run.model, 0)
        load(directory / str(number), BEST, run.model)
        kept = [parameter.full_tensor() if is_sharded else parameter for parameter in run.model.parameters()]
        if any(tensor.min() != 7 or tensor.max() != 7 for tensor in kept):
            wrong.append(inside)
        run.model(torch.ones(1, 4)).sum().backward()  # the weights can still be trained
    return wrong


@pytest.mark.parametrize(
    ("world_size", "is_sharded", "settings"),
    [
        (1, False, {}),
        (1, False, {"async_save": True}),
        (2, False, {}),
        (2, False, {"async_save": True}),
        (2, True, {}),
        (2, True, {"async_save": True}),
        (2, True, {"format": "dcp"}),
    ],
    ids=str,
)
def test_inference_mode_around_any_call_changes_nothing(world_size, is_sharded, settings, tmp_path):
    assert run_ranks(in_inference_mode, world_size, tmp_path, settings, is_sharded) == [[]] * world_size


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def resume_beside_a_default_device(directory: Path, file_format):
    torch.manual_seed(0)
    model = fsdp2(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = {"optimizer": optimizer}
    moments = [optimizer.state[parameter]["exp_avg"] for parameter in model.parameters()]
    before = [whole(moment) for moment in moments]
    torch.set_default_device("meta")  # as "cuda" would be, but nothing can be computed there
    try:
        with BestKeeper(
            model, directory=directory, metric_key="loss", format=file_format, training_state=state
        ) as keeper:
            keeper.observe(1.0, epoch=1)
        for moment in moments:
            moment.zero_()
        load(directory, BEST, model, training_state=state)
    finally:
        torch.set_default_device(None)
    after = [whole(optimizer.state[parameter]["exp_avg"]) for parameter in model.parameters()]
    return list(map(torch.equal, after, before))


@pytest.mark.parametrize("file_format", ["torch", "dcp"])
def test_optimizer_resumes_beside_a_default_device(file_format, tmp_path):
    assert run_ranks(resume_beside_a_default_device, 2, tmp_path, file_format) == [[True] * 4] * 2


def test_weights_of_a_model_made_in_inference_mode_are_kept(tmp_path):
    with torch.inference_mode():
        model = nn.Linear(1, 1)
    for number, settings in enumerate(({}, {"async_save": True})):
        with torch.inference_mode():
            set_weights(model, 1)
        with BestKeeper(model, directory=tmp_path / str(number), metric_key="loss", **settings) as keeper:
            keeper.observe(1.0, update(1))
        assert saved_at(tmp_path / str(number), BEST) == 1


def test_pin_is_released_before_a_resumed_block_begins(tmp_path):
    with Run(tmp_path).keeper as keeper:
        keeper.observe(1.0, epoch=1)
        keeper.flush(pin="epoch-1")
        state = keeper.state_dict()
        keeper.observe(0.5, epoch=2)
    keeper = Run(tmp_path).keeper
    keeper.load_state_dict(state)
    keeper.release("epoch-1")
    with keeper:
        keeper.observe(0.2, epoch=2)
    assert refs(tmp_path) == {BEST: "E2.r1"}
    assert snapshots(tmp_path) == {"E2.r1"}

"""The k best of a run keep their weights, whether or not they were ever the best."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from keepbest import BestKeeper, load
from keepbest.errors import ConfigError
from keepbest.reading.run import open_run
from keepbest.run.verify import verify
from tests.kit.pool import run_ranks
from tests.kit.runs import Run, refs, set_weights, snapshots, update

BEST = "best_model.loss"
VALUES = [5.0, 3.0, 4.0, 6.0, 3.0, 3.5]  # the fifth ties with the second, and is younger


def train(directory, values, first, **settings):
    model = nn.Linear(1, 1, bias=False)
    settings = {"tolerances": [1], "keep_top_k": 3, **settings}
    outcomes = []
    with BestKeeper(model, directory=directory, metric_key="loss", **settings) as keeper:
        for number, value in enumerate(values, start=first):
            set_weights(model, number)
            outcomes.append(keeper.observe(value, update(number)))
        state = keeper.state_dict()
    return [(each.is_new_best, each.enters_top, each.newly_exceeded) for each in outcomes], state


def stamps(directory):
    found = {}
    for ref in refs(directory):
        model = nn.Linear(1, 1, bias=False)
        load(directory, ref, model)
        found[ref.removeprefix(BEST)] = int(model.weight.item())
    return found


@pytest.mark.parametrize(
    "settings", [{}, {"async_save": True}, {"format": "dcp"}, {"format": "safetensors", "async_save": True}]
)
def test_each_of_the_best_has_a_ref_of_its_own_on_all_ranks(settings, tmp_path):
    results = run_ranks(run_train, 2, tmp_path, settings)
    assert results[0] == results[1]
    assert results[0] == [
        (True, True, ()),
        (True, True, ()),
        (False, True, ()),
        (False, False, (1,)),
        (False, True, ()),
        (False, True, ()),
    ]
    assert stamps(tmp_path) == {"": 2, ".tolerance=1": 2, ".top=1": 2, ".top=2": 5, ".top=3": 6}
    assert snapshots(tmp_path) == {"U2", "U5", "U6"}
    assert verify(tmp_path) == []
    assert list(open_run(tmp_path).refs) == [
        BEST,
        f"{BEST}.tolerance=1",
        f"{BEST}.top=1",
        f"{BEST}.top=2",
        f"{BEST}.top=3",
    ]


def run_train(directory, settings):
    return train(directory, VALUES, 1, **settings)[0]


def test_value_that_enters_the_best_may_close_a_tolerance_too(tmp_path):
    outcomes, _ = train(tmp_path, [3.0, 4.0, 3.5], 1)
    assert outcomes[-1] == (False, True, (1,))
    assert stamps(tmp_path) == {"": 1, ".tolerance=1": 1, ".top=1": 1, ".top=2": 3, ".top=3": 2}


def test_min_delta_holds_for_the_best_alone(tmp_path):
    outcomes, _ = train(tmp_path, [3.0, 2.9, 2.4], 1, min_delta=0.5)
    assert [outcome[:2] for outcome in outcomes] == [(True, True), (False, True), (True, True)]
    assert stamps(tmp_path) == {"": 3, ".tolerance=1": 3, ".top=1": 3, ".top=2": 2, ".top=3": 1}


def test_resumed_run_keeps_its_best_and_another_k_moves_the_refs(tmp_path):
    _, state = train(tmp_path, VALUES[:4], 1)
    assert [best["value"] for best in state["state"]["top"]] == [3.0, 4.0, 5.0]
    train(tmp_path, VALUES[4:], 5, resume="ledger")
    assert {ref: stamp for ref, stamp in stamps(tmp_path).items() if "top" in ref} == {
        ".top=1": 2,
        ".top=2": 5,
        ".top=3": 6,
    }
    train(tmp_path, [7.0], 7, resume="ledger", keep_top_k=2)
    assert stamps(tmp_path) == {"": 2, ".tolerance=1": 2, ".top=1": 2, ".top=2": 5}
    assert snapshots(tmp_path) == {"U2", "U5.r1"}
    train(tmp_path, [8.0], 8, resume="ledger", keep_top_k=1)
    assert stamps(tmp_path) == {"": 2, ".tolerance=1": 2}


@pytest.mark.parametrize(("before", "after"), [(1, 3), (2, 3), (3, 2)])
def test_resume_with_another_k_reports_no_weights_as_gone(before, after, tmp_path, caplog):
    _, state = train(tmp_path, VALUES[:5], 1, keep_top_k=before)
    keeper = BestKeeper(nn.Linear(1, 1), directory=tmp_path, metric_key="loss", tolerances=[0, 1], keep_top_k=after)
    keeper.load_state_dict(state)
    with keeper:
        assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == []
        assert [best.value for best in keeper.state.top] == [3.0, 3.0][:before]


def test_return_to_an_earlier_k_finds_the_state_as_it_was(tmp_path, caplog):
    _, state = train(tmp_path, VALUES[:5], 1, keep_top_k=1)
    settings = {"directory": tmp_path, "metric_key": "loss", "tolerances": [1]}
    keeper = BestKeeper(nn.Linear(1, 1), **settings, keep_top_k=3, resume="ledger")
    keeper.start()
    keeper.abandon()
    caplog.clear()
    keeper = BestKeeper(nn.Linear(1, 1), **settings, keep_top_k=1)
    keeper.load_state_dict(state)
    with keeper:
        assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == []


def test_values_that_are_no_numbers_are_never_among_the_best(tmp_path):
    outcomes, _ = train(tmp_path, [float("nan"), float("inf"), 1.0], 1)
    assert [outcome[1] for outcome in outcomes] == [False, False, True]
    assert stamps(tmp_path) == {"": 3, ".top=1": 3}


@pytest.mark.parametrize("k", [0, -1, 1.5, True])
def test_k_is_a_number_of_at_least_one(k, tmp_path):
    with pytest.raises(ConfigError, match=r"keep_top_k must be (greater than 0|a valid integer), found"):
        BestKeeper(torch.nn.Linear(1, 1), directory=tmp_path, metric_key="loss", keep_top_k=k)


def test_only_what_beats_the_baseline_is_kept(tmp_path):
    run = Run(tmp_path, baseline=3.0, min_delta=0.5, keep_top_k=2, tolerances=[0])
    with run.keeper:
        first = run.observe(3.1, 2.9, 2.4, 2.3)
    assert [(each.is_new_best, each.enters_top) for each in first] == [
        (False, False),
        (False, True),
        (True, True),
        (False, True),
    ]
    assert first[0].newly_exceeded == (0,)
    assert {ref: name for ref, name in refs(tmp_path).items() if ref == BEST} == {BEST: "U3"}
    with Run(tmp_path, baseline=3.0, min_delta=0.5, resume="ledger").keeper as keeper:
        assert keeper.best_metric_value == 2.4

"""A run that is resumed with another `min_delta` or `baseline` says what that changes."""

from __future__ import annotations

import logging
import math

import pytest

from tests.kit.runs import Run


def resume(directory, how, caplog, **settings):
    """The warnings of a resume of a run of 5.0, 4.8 and 4.0, and its best then."""
    first = Run(directory, tolerances=[0], min_delta=0.1)
    with first.keeper:
        first.observe(5.0, 4.8, 4.0)
    caplog.clear()
    again = Run(directory, **{"tolerances": [0], "min_delta": 0.1, **settings, **how})
    if not how:
        again.keeper.load_state_dict(first.keeper.state_dict())
    with caplog.at_level(logging.WARNING, "keepbest"), again.keeper as keeper:
        best = keeper.best_metric_value
        again.observe(9.0, first=4)
    return [record.getMessage() for record in caplog.records], best


HOW = [{"resume": "ledger"}, {}]


@pytest.mark.parametrize("how", HOW, ids=["by the ledger", "by a state"])
@pytest.mark.parametrize(
    ("settings", "change", "best"),
    [
        ({"min_delta": 0.9}, "min_delta was 0.1 and is 0.9", 4.0),
        ({"min_delta": 3.0}, "min_delta was 0.1 and is 3.0", 5.0),
        ({"baseline": 4.9}, "baseline was None and is 4.9", 4.0),
        ({"baseline": 4.5, "min_delta": 0.0}, "min_delta was 0.1 and is 0.0 and baseline was None and is 4.5", 4.0),
    ],
    ids=str,
)
def test_other_setting_is_one_warning(settings, change, best, how, tmp_path, caplog):
    messages, found = resume(tmp_path, how, caplog, **settings)
    [message] = [each for each in messages if "decided anew" in each]
    assert found == (best if best == 4.0 else math.inf)  # its weights were removed long ago, and the log says so
    assert f"best_model.loss: {change}. All that was observed up to U3 is decided anew by that: " in message
    consequence = "the best to beat stays" if best == 4.0 else "the best to beat was 4.0 at U3 and is 5.0 at U1"
    assert consequence in message


@pytest.mark.parametrize("how", HOW, ids=["by the ledger", "by a state"])
@pytest.mark.parametrize("settings", [{}, {"async_save": True, "on_save_error": "warn"}], ids=str)
def test_same_settings_are_no_warning(settings, how, tmp_path, caplog):
    assert resume(tmp_path, how, caplog, **settings) == ([], 4.0)


def test_setting_that_stays_is_no_second_warning(tmp_path, caplog):
    resume(tmp_path, {"resume": "ledger"}, caplog, baseline=4.9)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "keepbest"):
        Run(tmp_path, tolerances=[0], min_delta=0.1, baseline=4.9, resume="ledger").keeper.start()
    assert caplog.records == []


def test_run_without_an_observation_is_no_warning(tmp_path, caplog):
    Run(tmp_path, min_delta=0.1).keeper.start()
    with caplog.at_level(logging.WARNING, "keepbest"):
        Run(tmp_path, min_delta=0.2, resume="ledger").keeper.start()
    assert [record for record in caplog.records if "min_delta" in record.getMessage()] == []

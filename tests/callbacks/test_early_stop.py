from __future__ import annotations

import math
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepbest.callbacks import MetricEarlyStopper, MetricEarlyStopperConfig
from keepbest.errors import ConfigError, InvalidMetricError, MissingMetricError
from tests.callbacks.context import make_context, make_counter
from tests.kit.pool import run_ranks

KEY = "loss/val/total"


class Run:
    """One update after the other, with the metric logged before the callback is called."""

    def __init__(self, **settings):
        self.counter = make_counter()
        self.context = make_context(update_counter=self.counter)
        config = {"every_n_updates": 1, "metric_key": KEY, "tolerance": 1} | settings
        self.stopper = MetricEarlyStopper(MetricEarlyStopperConfig(**config), **self.context)

    def go(self, values):
        """Trains until the stopper stops or the values end; returns the updates that were done."""
        for value in values:
            self.counter.next_update()
            if value is not None:
                self.context["log_writer"].add_scalar(KEY, value)
            self.stopper.after_update(update_counter=self.counter, batch_size=4)
            self.context["log_writer"].flush()
            if self.context["trainer"].reasons:
                break
        return self.counter.update


@given(values=st.lists(st.sampled_from([0.0, 1.0, 2.0, math.nan, math.inf]), max_size=12), tolerance=st.integers(0, 3))
def test_training_stops_after_more_intervals_than_the_tolerance(values, tolerance):
    finite = [value if math.isfinite(value) else 99.0 for value in values]
    bests = list(accumulate(finite, min, initial=99.0))
    droughts, expected = 0, len(values)
    for update, value in enumerate(finite):
        droughts = 0 if value < bests[update] else droughts + 1
        if droughts > tolerance:
            expected = update + 1
            break
    run = Run(tolerance=tolerance)
    assert run.go(values) == expected
    assert bool(run.context["trainer"].reasons) == (droughts > tolerance)


def test_reason_names_metric_and_best():
    run = Run(tolerance=0)
    run.go([0.5, 0.25, 0.25])
    [reason] = run.context["trainer"].reasons
    assert reason == (
        "loss/val/total did not improve for 1 intervals, more than tolerance=0; the best was 0.25 at E1_U2_S24"
    )


def test_direction_and_min_delta_decide_what_is_an_improvement():
    assert Run(higher_is_better=True, tolerance=0).go([1.0, 2.0, 3.0, 2.0, 4.0]) == 4
    assert Run(min_delta=0.5, tolerance=0).go([3.0, 2.0, 1.5, 0.0]) == 3
    with pytest.raises(ConfigError, match="higher_is_better"):
        Run(metric_key="frobnication")


def test_resumed_run_stops_where_the_uninterrupted_one_does():
    values = [3.0, 2.0, 2.5, 2.5, 1.0, 1.5, 1.5, 1.5, 0.0]
    for interruption in range(8):
        first, second = Run(tolerance=2), Run(tolerance=2)
        first.go(values[:interruption])
        second.stopper.load_state_dict(first.stopper.state_dict())
        second.counter.load_state_dict(first.counter.state_dict())
        assert second.go(values[interruption:]) == 8


def test_run_that_was_stopped_stops_again_when_it_is_resumed():
    first, second = Run(tolerance=0), Run(tolerance=0)
    assert first.go([1.0, 1.0]) == 2
    second.stopper.load_state_dict(first.stopper.state_dict())
    second.counter.load_state_dict(first.counter.state_dict())
    assert second.go([0.5, 0.25]) == 3


def test_evaluation_observes_nothing():
    run = Run()
    run.stopper.at_eval(update_counter=run.counter, batch_size=4)
    assert run.stopper.state_dict() == Run().stopper.state_dict()


def test_two_stoppers_have_states_of_their_own():
    keys = {Run(metric_key=key, tolerance=n).stopper.state_key for key in (KEY, "loss/test/total") for n in (1, 2)}
    assert len(keys) == 4


def stop_by_the_mean():
    run = Run(tolerance=0)
    rank = run.context["ranks"].rank
    # The mean over two ranks improves twice, though the value of rank 1 never does.
    last = run.go([[1.0, 0.6, 0.1, 0.1], [1.0, 1.2, 1.3, 1.4]][rank])
    return last, run.context["trainer"].reasons


def test_all_ranks_stop_at_the_same_update():
    first, second = run_ranks(stop_by_the_mean, 2)
    assert first == second
    last, [reason] = first
    assert last == 4
    assert "the best was 0.7 at" in reason


def observe_what_rank_1_lacks(value):
    run = Run()
    try:
        run.go([1.0 if run.context["ranks"].rank == 0 else value])
    except (MissingMetricError, InvalidMetricError) as error:
        return type(error), str(error)


def test_a_value_that_one_rank_lacks_is_an_error_on_all():
    outcomes = run_ranks(observe_what_rank_1_lacks, 2, None)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] is MissingMetricError
    assert "rank 1: metric key 'loss/val/total' was not logged at E0_U1_S12" in outcomes[0][1]

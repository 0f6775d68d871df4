"""`decide` against a slow oracle that keeps nothing but the whole past and reads the rules off it."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepbest import TrainingIteration
from keepbest.decision import Best, BestState, Observation, Policy, decide, fold
from keepbest.errors import ConfigError, IterationError

VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.0, math.nan, math.inf, -math.inf]) | st.floats()
TIMELINES = st.lists(st.tuples(VALUES, st.booleans() | st.just(True)), max_size=25)
POLICIES = st.builds(
    Policy,
    st.booleans(),
    st.sampled_from([0.0, 0.0, 0.5, 1.0]),
    st.lists(st.integers(0, 6), unique=True, max_size=4).map(tuple),
    st.integers(1, 4),
    st.none() | st.none() | st.sampled_from([0.0, 1.0]),
)


def at(number):
    return TrainingIteration(epoch=number + 1, update=10 * number)


def timeline(values):
    return [Observation(at(number), value, durable) for number, (value, durable) in enumerate(values)]


def improvements(policy, values):
    """Where the values improve, from section 3: strictly, by more than min_delta, finite, and saved."""
    found = []
    for number, (value, durable) in enumerate(values):
        best = values[found[-1]][0] if found else policy.baseline
        if not math.isfinite(value) or not durable:
            continue
        if best is None or (value - best if policy.higher_is_better else best - value) > policy.min_delta:
            found.append(number)
    return found


def oracle(policy, values):
    """Counter, best and what each tolerance kept, after all the values."""
    bests = improvements(policy, values)
    droughts = []
    for number in range(len(values)):
        last = max((best for best in bests if best <= number), default=-1)
        droughts.append(number - last)
    exceeded = {}
    for tolerance in policy.tolerances:
        over = [number for number, drought in enumerate(droughts) if drought > tolerance]
        if over:
            exceeded[tolerance] = max((best for best in bests if best < over[0]), default=None)
    return (droughts or [0])[-1], (bests or [None])[-1], exceeded


def top(policy, values):
    """Where the best values are: finite and saved, the better first, and of equal ones the older."""
    sign = -1 if policy.higher_is_better else 1
    limit = math.inf if policy.baseline is None else sign * policy.baseline
    counted = [
        number
        for number, (value, durable) in enumerate(values)
        if durable and math.isfinite(value) and sign * value < limit
    ]
    best = sorted(counted, key=lambda number: (sign * values[number][0], number))[: policy.top_k]
    return best if policy.top_k > 1 else []


@given(POLICIES, TIMELINES)
def test_state_follows_from_the_whole_past(policy, values):
    state = fold(policy, timeline(values))
    counter, best, exceeded = oracle(policy, values)

    def named(number):
        return None if number is None else Best(values[number][0], at(number))

    assert state.tolerance_counter == counter
    assert state.best == named(best)
    assert state.exceeded == {tolerance: named(number) for tolerance, number in exceeded.items()}
    assert state.top == tuple(map(named, top(policy, values)))
    assert state.last_iteration == (at(len(values) - 1) if values else None)


@given(POLICIES, TIMELINES)
def test_decision_says_what_changed(policy, values):
    state = BestState()
    for number, observation in enumerate(timeline(values)):
        state, decision = decide(policy, state, observation)
        before, now = oracle(policy, values[:number])[2], oracle(policy, values[: number + 1])[2]
        assert decision.is_new_best == (number in improvements(policy, values))
        assert decision.newly_exceeded == tuple(sorted(now.keys() - before.keys()))


@given(POLICIES, TIMELINES, st.integers(0, 25))
def test_resuming_from_any_state_ends_like_the_uninterrupted_run(policy, values, interruption):
    observations = timeline(values)
    middle = fold(policy, observations[:interruption])
    restored = BestState.from_json(json.loads(json.dumps(middle.to_json(), allow_nan=False)))
    assert restored == middle
    assert fold(policy, observations[interruption:], start=restored) == fold(policy, observations)


@given(POLICIES, TIMELINES)
def test_failed_save_counts_like_no_improvement(policy, values):
    lost = [(value if durable else math.nan, True) for value, durable in values]
    assert fold(policy, timeline(values)) == fold(policy, timeline(lost))


@given(POLICIES, TIMELINES)
def test_lower_is_better_is_the_mirror_of_higher_is_better(policy, values):
    baseline = None if policy.baseline is None else -policy.baseline
    mirrored = Policy(not policy.higher_is_better, policy.min_delta, policy.tolerances, baseline=baseline)
    negated = [(-value, durable) for value, durable in values]
    one, other = fold(policy, timeline(values)), fold(mirrored, timeline(negated))
    assert (one.tolerance_counter, one.exceeded.keys()) == (other.tolerance_counter, other.exceeded.keys())
    assert (one.best is None) == (other.best is None)
    assert one.best is None or (one.best.value, one.best.iteration) == (-other.best.value, other.best.iteration)


def test_tolerances_close_at_their_interval_and_stay_closed():
    policy = Policy(False, tolerances=(2, 0))
    values = [3.0, 3.0, 2.0, 2.5, 2.5, 2.5, 1.0]
    state, closed = BestState(), []
    for observation in timeline([(value, True) for value in values]):
        state, decision = decide(policy, state, observation)
        closed.append(decision.newly_exceeded)
    assert closed == [(), (0,), (), (), (), (2,), ()]
    assert state.exceeded == {0: Best(3.0, at(0)), 2: Best(2.0, at(2))}
    assert state.best == Best(1.0, at(6))


def test_zero_is_a_value_and_a_tie_is_not_better():
    values = [(0.0, True), (-0.0, True), (0.0, True)]
    assert fold(Policy(True), timeline(values)) == BestState(Best(0.0, at(0)), 2, {}, at(2))
    assert fold(Policy(False), timeline([(1.0, True), (0.0, True)])).best == Best(0.0, at(1))


def test_min_delta_must_be_exceeded():
    values = [(1.0, True), (0.5, True), (0.25, True)]
    assert fold(Policy(False, min_delta=0.5), timeline(values)).best == Best(0.25, at(2))


@pytest.mark.parametrize("iteration", [at(3), at(2), TrainingIteration(epoch=5, update=29), TrainingIteration(epoch=9)])
def test_iteration_that_does_not_follow_is_refused(iteration):
    state = fold(Policy(True), timeline([(1.0, True)] * 4))
    with pytest.raises(IterationError, match=f"iteration {iteration} does not"):
        decide(Policy(True), state, Observation(iteration, 2.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_delta": -0.1}, "min_delta"),
        ({"min_delta": math.nan}, "min_delta"),
        ({"min_delta": math.inf}, "min_delta"),
        ({"tolerances": (-1,)}, "tolerances"),
        ({"tolerances": (1.0,)}, "tolerances"),
        ({"tolerances": (True,)}, "tolerances"),
        ({"tolerances": (2, 5, 2)}, "differ"),
    ],
)
def test_settings_that_cannot_be_right_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Policy(True, **settings)

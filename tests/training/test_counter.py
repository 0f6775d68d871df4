from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepbest.errors import ConfigError
from keepbest.iteration import TrainingIteration
from keepbest.training.counter import UpdateCounter


def counter(**end: int) -> UpdateCounter:
    return UpdateCounter(updates_per_epoch=5, effective_batch_size=4, end=TrainingIteration(**end))


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 60))
def test_counts_what_a_loop_counts(updates_per_epoch, effective_batch_size, updates):
    counter = UpdateCounter(
        updates_per_epoch=updates_per_epoch,
        effective_batch_size=effective_batch_size,
        end=TrainingIteration(update=30),
    )
    epoch = sample = in_epoch = 0
    full = False
    for _ in range(updates):
        counter.next_update()
        sample += effective_batch_size
        in_epoch += 1
        full = in_epoch == updates_per_epoch
        if full:
            epoch, in_epoch = epoch + 1, 0
    assert counter.iteration == TrainingIteration(epoch=epoch, update=updates, sample=sample)
    assert counter.is_full_epoch == full
    assert counter.is_finished == (updates >= 30)


@pytest.mark.parametrize(
    ("end", "update"), [({"epoch": 3}, 15), ({"update": 7}, 7), ({"sample": 8}, 2), ({"sample": 9}, 3)]
)
def test_end(end, update):
    assert counter(**end).end_update == update


@pytest.mark.parametrize("end", [{"epoch": 1, "update": 5}, {"sample": 0}])
def test_end_that_is_not_one_positive_part(end):
    with pytest.raises(ConfigError, match="exactly one"):
        counter(**end)


def test_state_goes_on():
    first, second = counter(epoch=3), counter(epoch=4)
    for _ in range(7):
        first.next_update()
    second.load_state_dict(first.state_dict())
    assert str(second.iteration) == "E1_U7_S28"


@pytest.mark.parametrize("change", [{"updates_per_epoch": 6}, {"effective_batch_size": 5}])
def test_state_of_another_kind_of_run_is_refused(change):
    target = counter(epoch=3)
    with pytest.raises(ConfigError, match=f"{next(iter(change))}={next(iter(change.values()))}, this one has"):
        target.load_state_dict({**target.state_dict(), **change})

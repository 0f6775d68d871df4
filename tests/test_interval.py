from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepbest.errors import ConfigError
from keepbest.interval import Interval

COUNTS = st.integers(1, 12)


@given(n=COUNTS, updates_per_epoch=COUNTS, effective_batch_size=COUNTS)
def test_due_updates_equal_a_count_sample_by_sample(n, updates_per_epoch, effective_batch_size):
    samples = epochs = 0
    for update in range(1, 40):
        passed = False
        for _ in range(effective_batch_size):
            samples += 1
            passed |= samples % n == 0
        epoch_ends = update % updates_per_epoch == 0
        epochs += epoch_ends
        expected = {
            Interval(every_n_epochs=n): epoch_ends and epochs % n == 0,
            Interval(every_n_updates=n): update % n == 0,
            Interval(every_n_samples=n): passed,
        }
        for interval, due in expected.items():
            assert due == interval.is_due(
                update=update, updates_per_epoch=updates_per_epoch, effective_batch_size=effective_batch_size
            )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "expected exactly one of .*, found none"),
        ({"every_n_epochs": 1, "every_n_updates": 2}, "found every_n_epochs=1, every_n_updates=2"),
        ({"every_n_updates": 0}, "every_n_updates must be an integer > 0, found 0"),
        ({"every_n_samples": -3}, "every_n_samples must be an integer > 0, found -3"),
        ({"every_n_epochs": True}, "found True"),
        ({"every_n_epochs": 1.0}, "found 1.0"),
    ],
)
def test_anything_but_one_positive_integer_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Interval(**settings)


def test_prints_as_the_setting_that_made_it():
    assert str(Interval(every_n_epochs=5)) == "every_n_epochs=5"
    assert str(Interval(every_n_updates=1)) == "every_n_updates=1"
    assert str(Interval(every_n_samples=640)) == "every_n_samples=640"

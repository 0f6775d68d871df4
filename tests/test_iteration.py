from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keepbest import TrainingIteration
from keepbest.errors import IterationError

COUNTS = st.integers(0, 10**9)
ITERATIONS = st.builds(
    TrainingIteration, st.none() | COUNTS, st.none() | COUNTS, COUNTS, st.none() | COUNTS
) | st.builds(TrainingIteration, COUNTS)  # fmt: skip


@pytest.mark.parametrize(
    ("iteration", "text"),
    [
        (TrainingIteration(epoch=7, update=140, sample=8960), "E7_U140_S8960"),
        (TrainingIteration(epoch=0), "E0"),
        (TrainingIteration(update=3), "U3"),
        (TrainingIteration(epoch=1, sample=9), "E1_S9"),
        (TrainingIteration(update=3, batch=12), "U3_B12"),
    ],
)
def test_is_printed_without_its_absent_parts(iteration, text):
    assert str(iteration) == text


@given(ITERATIONS)
def test_text_is_parsed_back(iteration):
    assert TrainingIteration.parse(str(iteration)) == iteration


@pytest.mark.parametrize(
    "text", ["", "7", "E", "E-1", "E07", "E1U2", "_U1", "U1_E1", "E1_U2_", "e1", " E1", "E1\n", "E1_S2_U3", "E٣"]
)
def test_other_text_is_refused(text):
    with pytest.raises(IterationError, match="not a training iteration"):
        TrainingIteration.parse(text)


@pytest.mark.parametrize(
    "parts", [{}, {"epoch": -1}, {"update": 1.0}, {"sample": True}, {"epoch": 1, "update": "2"}, {"sample": 2**63}]
)
def test_parts_are_integers_and_at_least_one(parts):
    with pytest.raises(IterationError, match="TrainingIteration"):
        TrainingIteration(**parts)


@pytest.mark.parametrize(
    "part",
    [np.int64(3), np.uint8(3), torch.tensor(3), torch.tensor([3])],
    ids=lambda value: f"{type(value).__name__} {value!r}",
)
def test_integers_of_other_libraries_are_parts(part):
    iteration = TrainingIteration(epoch=part)
    assert (iteration, type(iteration.epoch)) == (TrainingIteration(epoch=3), int)


@pytest.mark.parametrize(
    "part", [1.5, np.float32(1.0), np.bool_(True), torch.tensor(True), torch.tensor(1.0), -1], ids=repr
)
def test_other_numbers_are_no_parts(part):
    with pytest.raises(IterationError, match="epoch must be an integer >= 0, got"):
        TrainingIteration(epoch=part)


@given(first=st.tuples(*[COUNTS] * 4), second=st.tuples(*[COUNTS] * 4))
def test_follows_when_no_part_goes_back_and_one_goes_on(first, second):
    steps = [later - earlier for earlier, later in zip(first, second, strict=True)]
    follows = TrainingIteration(*second).follows(TrainingIteration(*first))
    assert follows == (min(steps) >= 0 and max(steps) > 0)


def test_iterations_of_other_parts_cannot_be_compared():
    with pytest.raises(IterationError, match="E1_U2 does not name the same parts as E1"):
        TrainingIteration(epoch=1, update=2).follows(TrainingIteration(epoch=1))

"""What ranks in different places are shown: the words that differ, and nothing else."""

from __future__ import annotations

import pytest

from keepbest.ranks.difference import SEPARATOR, describe_difference

STEP = "check the settings"


@pytest.mark.parametrize(
    ("states", "lines"),
    [
        (["a=1 b=2 c=3", "a=1 b=4 c=3"], ["rank 0: b=2", "rank 1: b=4"]),
        (["a=1 b=2 c=3", "a=5 b=2 c=6"], ["rank 0: a=1 c=3", "rank 1: a=5 c=6"]),
        (["a=1", "a=2", "a=1", "a=2"], ["rank 0, 2: a=1", "rank 1, 3: a=2"]),
        (["a=[1, 2] b=(3, {4: 5})", "a=[1, 2] b=(3, {4: 6})"], ["rank 0: b=(3, {4: 5})", "rank 1: b=(3, {4: 6})"]),
        (["a='x y (' b=1", "a='x y (' b=2"], ["rank 0: b=1", "rank 1: b=2"]),
        (["a=1 b=2 c=3", "a=1 c=3"], ["rank 0: b=2", "rank 1: nothing"]),
        (["", "a=1"], ["rank 0: nothing", "rank 1: a=1"]),
        (["a=1 b=2", "a=1 a=1 b=2"], ["rank 0: nothing", "rank 1: a=1"]),
        ([f"a={'x' * 5000}", "a=y"], [f"rank 0: a={'x' * 598} ...", "rank 1: a=y"]),
        (["a=[1 2", "a=[1 3"], ["rank 0: a=[1 2", "rank 1: a=[1 3"]),  # cut off, as what is too long to be sent
    ],
    ids=str,
)
def test_words_that_differ_are_shown_alone(states, lines):
    described = describe_difference([f"{STEP}{SEPARATOR}{state}" for state in states])
    assert described.splitlines() == [f"the ranks differ in step '{STEP}':", *(f"  {line}" for line in lines)]


def test_ranks_in_different_steps_are_shown_their_steps_alone():
    places = ["observe loss", "observe loss", "close loss"]
    described = describe_difference([f"{place}{SEPARATOR}a={number}" for number, place in enumerate(places)])
    assert described == "the ranks are not in the same step:\n  rank 0, 1: observe loss\n  rank 2: close loss"

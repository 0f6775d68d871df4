from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from keepbest.run.names import best_ref, part_name, tolerance_ref

KEYS = st.text(max_size=12) | st.text("ab/.%=~_-é", max_size=8) | st.text(min_size=100, max_size=300)
IDS = st.none() | KEYS


@pytest.mark.parametrize(
    ("key", "identity", "ref"),
    [
        ("loss/val/total", None, "best_model.loss.val.total"),
        ("loss_val-2", None, "best_model.loss_val-2"),
        ("top.5 %", None, "best_model.top%2E5%20%25"),
        ("accuracy/ü", "b/c", "best_model.accuracy.%C3%BC.id=b.c"),
    ],
)
def test_refs_read_like_their_keys(key, identity, ref):
    assert best_ref(key, identity) == ref
    assert tolerance_ref(ref, 5) == f"{ref}.tolerance=5"


@given(KEYS, IDS, KEYS, IDS)
@example("a/b", None, "a.b", None)
@example("a", "b", "a.id=b", None)
@example("a", None, "a.tolerance=1", None)
@example("a" * 200, None, "a" * 200 + "b", None)
@example("a%2Fb", None, "a/b", None)
def test_different_keys_and_ids_have_different_names(key, identity, other_key, other_identity):
    names = [best_ref(key, identity), best_ref(other_key, other_identity)]
    assert (names[0] == names[1]) == ((key, identity) == (other_key, other_identity))
    assert tolerance_ref(names[0], 1) != names[1]


@given(KEYS, KEYS)
def test_parts_of_different_names_have_different_files(name, other):
    # Their dots are those of module paths.
    assert (part_name(name) == part_name(other)) == (name == other)


@given(st.text() | KEYS, IDS, st.integers(0, 10**6))
def test_names_are_one_component_that_any_file_system_takes(key, identity, tolerance):
    for name in (tolerance_ref(best_ref(key, identity), tolerance), f"{part_name(key)}.pt"):
        assert re.fullmatch(r"[A-Za-z0-9_%.=~-]+", name)
        assert name not in (".", "..")
        assert len(name) <= 255


def test_surrogates_of_undecodable_bytes_are_names_too():
    assert best_ref("a\udcff") != best_ref("a\udcfe")

"""Containers in containers, and the way to what they hold."""

from __future__ import annotations

from collections import Counter, OrderedDict

from keepbest.modules.nested import leaves, spelled


def test_leaves_are_found_with_the_way_to_them():
    value = {"a": [1, (2, {"b": 3})], "c": Counter({4: 5}), "d": OrderedDict(e={6}), "f": []}
    found = [(spelled(path), leaf) for path, leaf in leaves(value)]
    numbers = [(path, leaf) for path, leaf in found if not isinstance(leaf, str)]
    assert numbers == [
        ("['a'][0]", 1),
        ("['a'][1][0]", 2),
        ("['a'][1][1]['b']", 3),
        ("['c'][4]", 5),
        ("['c'][4]", 4),
        ("['d']['e'][0]", 6),
    ]
    assert sorted(leaf for _, leaf in found if isinstance(leaf, str)) == ["a", "b", "c", "d", "e", "f"]
    assert list(leaves(7)) == [((), 7)]


def test_container_that_holds_itself_has_an_end():
    value = {"a": 1}
    value["b"] = [value]
    assert [leaf for _, leaf in leaves(value)] == [1, "a", "b"]

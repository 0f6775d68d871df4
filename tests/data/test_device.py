from __future__ import annotations

from typing import NamedTuple

import torch

from keepbest.data import move_to_device


class Pair(NamedTuple):
    image: torch.Tensor
    label: str


def test_tensors_are_moved_wherever_they_are_nested():
    tensor = torch.ones(2)
    moved = move_to_device({"a": [tensor, 1], "b": (Pair(tensor, "cat"), None)}, torch.device("meta"))
    assert moved["a"][0].is_meta
    assert moved["a"][1] == 1
    pair, nothing = moved["b"]
    assert isinstance(pair, Pair)
    assert pair.image.is_meta
    assert (pair.label, nothing) == ("cat", None)
    assert not tensor.is_meta

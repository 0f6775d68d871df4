"""Which rank writes what several hold whole. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import torch

from keepbest.capture.catalogue import Form, Name
from keepbest.capture.union import Union


def spread_over_holders(union: Union) -> Mapping[Name, int]:
    """The rank that writes each tensor which is not shared out among ranks; the same on every rank.

    Parameters are equal on all ranks that hold them. So they are spread, such that each rank writes about as many
    bytes. What else there is may differ, and is that of its owner.
    """
    whole = {name: holding for name, holding in union.kept.items() if not holding.entry.form.spread}
    writers = {name: holding.owner for name, holding in whole.items()}
    equal = [(name, holding) for name, holding in whole.items() if holding.entry.form.role == "parameter"]
    load: Counter[int] = Counter()
    # The largest first, as it is hardest to place.
    for name, holding in sorted(equal, key=lambda found: _bytes_of(found[1].entry.form), reverse=True):
        writers[name] = min(holding.holders, key=lambda rank: (load[rank], rank))
        load[writers[name]] += _bytes_of(holding.entry.form)
    return writers


def _bytes_of(form: Form) -> int:
    dtype: torch.dtype = getattr(torch, form.dtype)
    return math.prod(form.shape) * dtype.itemsize

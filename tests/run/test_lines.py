"""The lines of a ledger: JSON that gives back the event, whichever way a line was made."""

from __future__ import annotations

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from keepbest.iteration import TrainingIteration
from keepbest.run.events import Observed
from keepbest.run.lines import decode_line, encode_line
from keepbest.run.names import REF_PREFIX

NAMES = st.text("abc_-.%=0", min_size=1, max_size=20).map(lambda text: f"{REF_PREFIX}{text}")
COUNTS = st.integers(0, 2**63 - 1)


@given(keeper=NAMES, update=COUNTS, epoch=st.none() | COUNTS, value=st.floats(), lost=st.booleans())
def test_line_of_an_observation_is_the_json_of_its_fields(keeper, update, epoch, value, lost):
    observed = Observed(keeper, TrainingIteration(epoch=epoch, update=update), value, lost=lost)
    line = encode_line(observed)
    fields = json.loads(line)
    assert fields == {
        "event": "observation",
        "keeper": keeper,
        "iteration": f"U{update}" if epoch is None else f"E{epoch}_U{update}",
        "value": value if math.isfinite(value) else str(value),
        **({"lost": True} if lost else {}),
        "crc": fields["crc"],
    }
    assert repr(decode_line(line)) == repr(observed)
